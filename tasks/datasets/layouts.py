"""Where the pictures that the published lists name lie on disk: several layouts of each data set are accepted.

cub200          <root>/CUB_200_2011/images/<class>/<file>, <root>/images/<class>/<file> or <root>/<class>/<file>
cifar100        <root>/{train,test}/<fine label>/<index>.png, the index being that of the official order
miniimagenet    <root>/{train,test}/<wnid>/<file>, also below MINI-ImageNet/ or images/
                <root>/images/<wnid>/<file> or <root>/<wnid>/<file>, all 600 of a class together
                <root>/images/<file> or <root>/<file>, flat, as the CSV files of other splits name them
                <root>/<wnid>/<wnid>_<number>.JPEG, ImageNet's own training folders, also below train/ or
                ILSVRC/Data/CLS-LOC/train/: the last four digits of a file of miniImageNet are the rank, from 1,
                of its picture among the class's, sorted by number; so all pictures of the class must be there
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

from tasks.datasets.pictures import Picture
from tasks.datasets.settings import DatasetError

Locate = Callable[[str, str], tuple[str, Picture] | None]
"""From split (``train`` or ``test``) and a list's line to class folder and picture; None where there is none."""

PATTERNS = {
    "cub200": ("CUB_200_2011/images/{folder}/{file}", "images/{folder}/{file}", "{folder}/{file}"),
    "miniimagenet": (
        "MINI-ImageNet/{split}/{folder}/{file}",
        "{split}/{folder}/{file}",
        "images/{split}/{folder}/{file}",
        "images/{folder}/{file}",
        "{folder}/{file}",
        "images/{file}",
        "{file}",
    ),
}
IMAGENET_PARENTS = ("", "train", "ILSVRC/Data/CLS-LOC/train")


def find_layout(name: str, root: Path, train: str, test: str) -> Locate | None:
    """Recognise the layout by one training and one test line of the lists.

    Returns:
        How to find any other line's picture, or None where no layout fits. The picture is not promised to exist.
    """
    if name == "cifar100":
        return _indexed(root) if (root / "train").is_dir() and (root / "test").is_dir() else None
    for pattern in PATTERNS[name]:
        locate = _by_pattern(pattern)
        if all(_exists(root, locate(split, line)) for split, line in (("train", train), ("test", test))):
            return locate
    return _imagenet(root, _folder_and_file(train)[0]) if name == "miniimagenet" else None


def _exists(root: Path, found: tuple[str, Picture] | None) -> bool:
    return found is not None and (root / found[1].path).is_file()


def _folder_and_file(line: str) -> tuple[str, str]:
    folder, file = line.split("/")[-2:]
    return folder, file


def _id(line: str) -> str:
    """The same whichever layout: the line without the archive's name."""
    return "-".join(line.split("/")[1:])


def _by_pattern(pattern: str) -> Locate:
    def locate(split: str, line: str) -> tuple[str, Picture]:
        folder, file = _folder_and_file(line)
        return folder, Picture(_id(line), pattern.format(split=split, folder=folder, file=file))

    return locate


def _indexed(root: Path) -> Locate:
    """CIFAR-100: the folders say which class the picture of an index belongs to."""
    found: dict[tuple[str, int], tuple[str, Picture]] = {}
    for split in ("train", "test"):
        for folder in sorted((root / split).iterdir()):
            for path in sorted(folder.glob("*.png")):
                if not path.stem.isdecimal():
                    raise DatasetError(
                        f"{path} is not named by its index in the official order of CIFAR-100, as the lists name it; "
                        f"remove it, or write the pictures with `make data DATASET=cifar100`"
                    )
                picture = Picture(f"{split}-{folder.name}-{path.name}", f"{split}/{folder.name}/{path.name}")
                if (twin := found.setdefault((split, int(path.stem)), (folder.name, picture))[1]) != picture:
                    raise DatasetError(
                        f"{picture.path} and {twin.path} have one index; remove one of the two"
                    )
    return lambda split, line: found.get((split, int(line)))


def _imagenet(root: Path, folder: str) -> Locate | None:
    parents = (root / parent for parent in IMAGENET_PARENTS)
    parent = next((p for p in parents if any((p / folder).glob(f"{folder}_*.JPEG"))), None)
    if parent is None:
        return None

    @cache
    def ranked(wnid: str) -> list[str]:
        files = (path.relative_to(root).as_posix() for path in (parent / wnid).glob(f"{wnid}_*.JPEG"))
        return sorted(files, key=lambda path: int(re.findall(r"\d+", path)[-1]))

    def locate(split: str, line: str) -> tuple[str, Picture] | None:
        wnid, file = _folder_and_file(line)
        rank = int(Path(file).stem[-4:])
        return (wnid, Picture(_id(line), ranked(wnid)[rank - 1])) if rank <= len(ranked(wnid)) else None

    return locate
