"""CIFAR-100's binary version to pictures: ``<split>/<fine label>/<index>.png``, 32 x 32, as the layouts ask for.

``train.bin`` and ``test.bin`` hold records of one byte coarse label, one byte fine label, and 3 x 32 x 32 bytes, red,
green and blue plane, in the official order that the session lists count in. The other version is a pickle, which is
not opened: a pickle is a program.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tasks.datasets.settings import DatasetError
from tasks.images import save_png

SIDE = 32
RECORD = 2 + 3 * SIDE * SIDE
MEMBERS = tuple(f"cifar-100-binary/{file}" for file in ("train.bin", "test.bin", "fine_label_names.txt"))
"""What is needed of the archive."""


def write_cifar(unpacked: Path, target: Path) -> None:
    """Write all pictures of the unpacked archive below ``target``; the bytes are the same on any machine.

    Raises:
        DatasetError: A file is missing or is not what its name says.
    """
    train, test, names_file = (unpacked / member for member in MEMBERS)
    for path in (train, test, names_file):
        if not path.is_file():
            raise DatasetError(
                f"the archive lacks {path.relative_to(unpacked)}: it is not cifar-100-binary.tar.gz"
            )
    names = _label_names(names_file)
    for split, path in (("train", train), ("test", test)):
        for name in names:
            (target / split / name).mkdir(parents=True)
        records = _records(path, len(names))
        for index, record in enumerate(tqdm(records, desc=f"writing {split}", unit="picture", disable=None)):
            pixels = torch.from_numpy(record[2:]).reshape(3, SIDE, SIDE) / 255.0
            save_png(pixels, target / split / names[record[1]] / f"{index:05d}.png")


def _label_names(path: Path) -> list[str]:
    names = path.read_text("ascii", errors="replace").split()
    if names != sorted(set(names)) or not all(name.replace("_", "").isalpha() for name in names):
        raise DatasetError(f"{path.name} does not hold the fine labels of CIFAR-100 in alphabetical order")
    return names


def _records(path: Path, n_labels: int) -> np.ndarray:
    """uint8 [n, 3074]."""
    data = np.fromfile(path, dtype=np.uint8)
    if len(data) == 0 or len(data) % RECORD:
        raise DatasetError(f"{path.name} has {len(data):,} bytes, which are not records of {RECORD}")
    records = data.reshape(-1, RECORD)
    if (highest := int(records[:, 1].max())) >= n_labels:
        raise DatasetError(f"{path.name} has the fine label {highest}, but there are {n_labels} labels")
    return records
