"""Anyone's pictures: one folder for each class, cut by seed (``dataset=imagefolder`` and ``dataset=digits``).

    <root>/{train,test}/<class>/<picture>       a split that is given
    <root>/{train,val,test}/<class>/<picture>   the base classes validate on val/, and all of train/ trains
    <root>/<class>/<picture>                    a fifth of each class is set aside for testing

Which pictures are drawn depends on ``split_seed`` and the file names alone: it is the same for every run, and
adding a picture moves few others.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

from tasks.datasets.pictures import SUFFIXES, Draw, Picture, cut_class
from tasks.datasets.settings import DatasetError, DatasetSettings
from tasks.seeding import seed_for

log = logging.getLogger("fscil.datasets")

TEST_SHARE = 0.2
SPLITS = ("train", "val", "test")


def draw_folders(settings: DatasetSettings) -> tuple[list[str], list[Draw]]:
    """Choose the classes and draw each one's pictures.

    Returns:
        The class folders in label order, and what was drawn of each.

    Raises:
        DatasetError: Missing or empty folder, too few classes or pictures.
    """
    folders = _choose_classes(settings, _class_folders(settings))
    _tell_unread(settings, folders)
    return folders, [_draw(settings, label, folder) for label, folder in enumerate(folders)]


def _class_folders(settings: DatasetSettings) -> list[str]:
    """Names of the class folders that hold pictures, sorted."""
    root = settings.root
    if not root.is_dir():
        fetched = settings.name.removesuffix("_dev")
        make = f"run `make data DATASET={fetched}`, or " if fetched == "digits" else ""
        raise DatasetError(f"no data at {root}: {make}name the folder of your pictures with dataset.root=")
    if (root / "train").is_dir() != (root / "test").is_dir():
        there, missing = ("train", "test") if (root / "train").is_dir() else ("test", "train")
        rename = ", rename val/ if it is meant for testing" if (root / "val").is_dir() else ""
        raise DatasetError(
            f"{root} has {there}/ but no {missing}/: add it{rename}, or put the class folders directly into {root}"
        )
    parent = root / "train" if _is_split(root) else root
    names = [path.name for path in sorted(parent.iterdir()) if path.is_dir() and any(_pictures(path))]
    if not names:
        raise DatasetError(
            f"{parent} holds no class folder with pictures: expected {root}/train/<class>/<picture> and "
            f"{root}/test/<class>/<picture>, or {root}/<class>/<picture>"
        )
    return names


def _tell_unread(settings: DatasetSettings, folders: list[str]) -> None:
    """Say what lies among the pictures and is not read, and which folder is no class for want of pictures."""
    read = " ".join(SUFFIXES)
    parents = [settings.root / name for name in SPLITS] if _is_split(settings.root) else [settings.root]
    unread = [path for parent in parents for folder in folders for path in _others(parent / folder)]
    if unread:
        log.warning("%d files are not read, one is %s: pictures end in %s", len(unread), unread[0], read)
    if settings.class_order is None:
        for path in sorted(parents[0].iterdir()):
            if path.is_dir() and not path.name.startswith(".") and not any(_pictures(path)):
                log.warning("%s holds no picture, so it is no class: pictures end in %s", path, read)


def _others(folder: Path) -> list[Path]:
    """The visible files of a folder that are no pictures by their names."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [p for p in files if p.suffix.lower() not in SUFFIXES and not p.name.startswith(".")]


def _choose_classes(settings: DatasetSettings, found: list[str]) -> list[str]:
    order = list(settings.class_order) if settings.class_order is not None else found
    if absent := [name for name in order if name not in found]:
        raise DatasetError(f"dataset.class_order names {absent[0]!r}, but {settings.root} has no such class")
    if repeated := first_repeated(order):
        raise DatasetError(f"dataset.class_order names {repeated!r} twice; leave one out")
    if settings.n_classes > len(order):
        raise DatasetError(
            f"dataset {settings.name} has {len(order)} classes, but n_base={settings.n_base} + n_way="
            f"{settings.n_way} x n_sessions={settings.n_sessions} needs {settings.n_classes}; lower one"
        )
    return order[: settings.n_classes]


def first_repeated(names: list[str]) -> str | None:
    """The first name that stands in the list a second time."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _draw(settings: DatasetSettings, label: int, folder: str) -> Draw:
    root = settings.root
    if not _is_split(root):
        pool = _shuffled(settings, root / folder)
        n_test = max(1, round(TEST_SHARE * len(pool)))
        return cut_class(settings, label, folder, pool[:-n_test], None, pool[-n_test:])
    train, test = (_shuffled(settings, root / split / folder) for split in ("train", "test"))
    val = _shuffled(settings, root / "val" / folder) if (root / "val").is_dir() else None
    return cut_class(settings, label, folder, train, val, test)


def _shuffled(settings: DatasetSettings, folder: Path) -> list[Picture]:
    def key(picture: Picture) -> int:
        return seed_for(settings.split_seed, "split", picture.path)

    paths = [path.relative_to(settings.root).as_posix() for path in _pictures(folder)]
    for path in paths:
        if any("\ud800" <= letter <= "\udfff" for letter in path):
            raise DatasetError(f"the name of the picture {path!r} is not UTF-8; rename it")
    return sorted((Picture(path.replace("/", "-"), path) for path in paths), key=key)


def _pictures(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
                yield path


def _is_split(root: Path) -> bool:
    return (root / "train").is_dir()
