"""The published data sets in small: the same names, layouts and formats, three to six classes, lists of their own."""

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tasks.datasets.lists import Lists

WORDS = ("ant", "bee", "cat")
N_BASE, N_WAY, N_SESSIONS = 2, 1, 1
TRAIN, TEST = 5, 2


def picture(seed: int, kind: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@dataclass(frozen=True)
class World:
    """Files of the archive, and the texts of the lists."""

    name: str
    files: dict[str, bytes]
    lists: dict[str, str]

    @property
    def protocol(self) -> Lists:
        digests = {file: hashlib.sha256(text.encode()).hexdigest() for file, text in self.lists.items()}
        return Lists(N_BASE, N_WAY, N_SESSIONS, digests)

    def write_lists(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in self.lists.items():
            (folder / file).write_text(text)
        return folder

    def write_files(self, root: Path, strip: str = "") -> Path:
        for name, content in self.files.items():
            path = root / name.removeprefix(strip)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return root


def lists_of(lines: dict[tuple[str, str], list[str]]) -> dict[str, str]:
    """Lists from lines by split and class: two base classes in the first session, one class in the second."""
    return {
        f"{kind}_{n}.txt": "".join(line + "\n" for word in words for line in lines[split, word])
        for kind, split in (("session", "train"), ("test", "test"))
        for n, words in ((1, WORDS[:2]), (2, WORDS[2:]))
    }


def cub() -> World:
    files, lines, seed = {}, {}, 0
    for split, count in (("train", TRAIN), ("test", TEST)):
        for i, word in enumerate(WORDS, start=1):
            lines[split, word] = [
                f"CUB_200_2011/images/{i:03d}.Small_eyed_{word.title()}/{word}_{split}_{n}.jpg"
                for n in range(count)
            ]
            for line in lines[split, word]:
                files[line] = picture(seed := seed + 1)
    files["CUB_200_2011/README"] = b"not a picture"
    files["CUB_200_2011/images/._001.jpg"] = b"nor this"
    return World("cub200", files, lists_of(lines))


def mini() -> World:
    files, lines, seed = {}, {}, 1000
    ranks = iter(range(1, 1000))
    for split, count in (("train", TRAIN), ("test", TEST)):
        for word, wnid in zip(WORDS, ("n00000101", "n00000202", "n00000303"), strict=True):
            lines[split, word] = [
                f"MINI-ImageNet/{split}/{wnid}/{wnid}{next(ranks):08d}.jpg" for _ in range(count)
            ]
            for line in lines[split, word]:
                files[line] = picture(seed := seed + 1)
    return World("miniimagenet", files, lists_of(lines))


def cifar() -> World:
    """The binary version: records in an order that is not that of the labels."""
    files = {"cifar-100-binary/fine_label_names.txt": "".join(word + "\n" for word in WORDS).encode()}
    lines: dict[tuple[str, str], list[str]] = {}
    for split, count, seed in (("train", TRAIN, 1), ("test", TEST, 2)):
        random = np.random.default_rng(seed)
        labels = random.permutation(np.repeat(np.arange(len(WORDS)), count)).astype(np.uint8)
        records = random.integers(0, 256, (len(labels), 3074)).astype(np.uint8)
        records[:, 0], records[:, 1] = 7, labels
        files[f"cifar-100-binary/{split}.bin"] = records.tobytes()
        for label, word in enumerate(WORDS):
            lines[split, word] = [str(index) for index in np.flatnonzero(labels == label)]
    return World("cifar100", files, lists_of(lines))


def tar(files: dict[str, bytes], *extra: tarfile.TarInfo, mode: str = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as packed:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
        for info in extra:
            packed.addfile(info)
    return buffer.getvalue()
