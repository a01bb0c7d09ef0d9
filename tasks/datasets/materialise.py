"""``make data`` for the published data sets: lists and pictures below one folder, complete or not there at all.

    <root>/splits/         the session lists, checked by their sha256
    <root>/...             the pictures, in one of the layouts of layouts.py
    <root>/source.json     written last: which archive this is, and how many pictures the lists find in it

Everything is put together beside the folder and renamed; what was downloaded survives a break. A folder that holds
the pictures already is kept as it is and gets the lists. A second call looks for every picture and changes nothing.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from filelock import Timeout

from tasks.datasets.cifar import MEMBERS, write_cifar
from tasks.datasets.download import fetch, file_digest, local_path, shown
from tasks.datasets.layouts import find_layout
from tasks.datasets.lists import PUBLISHED, read_lists
from tasks.datasets.pictures import SUFFIXES
from tasks.datasets.published import Place, count_pictures
from tasks.datasets.settings import DatasetError
from tasks.datasets.sources import SOURCES
from tasks.datasets.unpack import unpack
from tasks.disk import Lock
from tasks.store import write_json

STAMP = "source.json"
LIST_BYTES = 10_000_000


class Origin(NamedTuple):
    """Where to fetch from, in place of the table of addresses.

    Attributes:
        archive: Address or path of the archive; None takes the table's.
        lists: Address or path of the folder of the lists; None takes the table's.
        sha256: Digest that the archive must have; None asks for the published one, where there is one.
    """

    archive: str | None = None
    lists: str | None = None
    sha256: str | None = None


def materialise(name: str, root: Path, origin: Origin, say: Callable[[str], None]) -> None:
    """Make the data set complete below ``root``.

    Args:
        name: One of ``SOURCES``.
        root: Its folder; there or not.
        origin: Where to fetch from.
        say: Is told what was done, a sentence at a time.

    Raises:
        DatasetError: Something could not be fetched, is not what it should be, or is in the way.
    """
    if (root / STAMP).is_file():
        count = _count(name, root, root / "splits", "was complete and is damaged now")
        say(f"{name} is complete in {root} ({count:,} pictures); nothing to do")
        return
    scratch = _scratch(root)
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        with Lock(scratch / "lock", timeout=0):
            lists = _fetch_lists(name, scratch / "splits", origin)
            if _has_pictures(name, root, lists):
                _adopt(name, root, lists, say)
            else:
                _put_together(name, root, lists, origin, say)
            shutil.rmtree(scratch)
    except Timeout as error:
        raise DatasetError(
            f"another command is at work on {root}; wait for it (it holds {scratch}/lock)"
        ) from error


def _count(name: str, root: Path, lists: Path, wrong: str) -> int:
    try:
        return count_pictures(Place(name, root, lists))
    except DatasetError as error:
        raise DatasetError(f"{root} {wrong}; move it away and run the command again ({error})") from error


def _fetch_lists(name: str, folder: Path, origin: Origin) -> Path:
    """The folder of the lists, checked: the one on disk that was named, or a fresh one."""
    base = origin.lists or SOURCES[name].lists
    if (local := local_path(base)) is not None:
        read_lists(name, local)
        return local
    for file, digest in PUBLISHED[name].digests.items():
        fetch(f"{base.rstrip('/')}/{file}", folder / file, LIST_BYTES, ("sha256", digest))
    return folder


def _has_pictures(name: str, root: Path, lists: Path) -> bool:
    train, test = read_lists(name, lists)
    return root.is_dir() and find_layout(name, root, train[0][0], test[0][0]) is not None


def _adopt(name: str, root: Path, lists: Path, say: Callable[[str], None]) -> None:
    """Add the lists to pictures that somebody placed there."""
    count = _count(name, root, lists, "holds some of the pictures, but not all that the lists name")
    if lists.resolve() != (root / "splits").resolve():
        _copy_lists(name, lists, root / "splits")
    _seal(name, root, None, count)
    say(f"{name}: the {count:,} pictures in {root} were kept, and the session lists added to them")


def _copy_lists(name: str, lists: Path, target: Path) -> None:
    """Only the lists go along, whatever else the folder holds; whole or not at all."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in PUBLISHED[name].digests:
        shutil.copyfile(lists / file, partial / file)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _put_together(name: str, root: Path, lists: Path, origin: Origin, say: Callable[[str], None]) -> None:
    if root.is_dir() and (strangers := sorted(path.name for path in root.iterdir())):
        raise DatasetError(
            f"{root} holds {strangers[0]!r}, but not the pictures of {name} in a layout that is known: move it away, "
            f"or choose another folder with --root. {_instructions(name, root)}"
        )
    archive = _fetch_archive(name, root, origin, say)
    whole = _unpack(name, archive, _scratch(root), lists)
    _copy_lists(name, lists, whole / "splits")
    count = count_pictures(Place(name, whole, whole / "splits"))
    _seal(name, whole, archive, count)
    if root.is_dir():
        root.rmdir()
    whole.rename(root)
    say(f"{name}: {count:,} pictures are in {root}. {SOURCES[name].terms}")


def _scratch(root: Path) -> Path:
    return root.with_name(f".{root.name}.download")


def _fetch_archive(name: str, root: Path, origin: Origin, say: Callable[[str], None]) -> Path:
    source = SOURCES[name]
    address = origin.archive or source.archive
    if address is None:
        raise DatasetError(_instructions(name, root))
    known = ("sha256", origin.sha256) if origin.sha256 else ("md5", source.md5) if source.md5 else None
    if local_path(address) is None:
        say(f"{name}: downloading {shown(address)}")
    file = Path(shown(address)).name or "archive"
    archive = fetch(address, _scratch(root) / file, source.unpacked, known)
    if known is None:
        say(
            f"{name}: no digest of {archive.name} is published; its sha256 is {file_digest(archive, 'sha256')}. It is "
            f"recorded in {STAMP}; give it with --sha256 to have it checked the next time"
        )
    return archive


def _instructions(name: str, root: Path) -> str:
    if SOURCES[name].archive is not None:
        return f"Or place the unpacked archive there: {SOURCES[name].archive}"
    return (
        f"No archive of {name} can be fetched: ImageNet's terms let nobody pass its pictures on. Get them from where "
        f"you have access, and place in {root} either train/<wnid>/<file> and test/<wnid>/<file>, or images/<file> "
        f"flat (files like n0153282900000792.jpg), or ImageNet's training folders <wnid>/<wnid>_<number>.JPEG of the "
        f"100 classes; or give an archive of one of these with --from <file or address>. Then run the command again"
    )


def _unpack(name: str, archive: Path, scratch: Path, lists: Path) -> Path:
    """Unpack beside the folder. Returns the folder in which the layout begins."""
    source, whole, raw = SOURCES[name], scratch / "whole", scratch / "raw"
    for folder in (whole, raw):
        shutil.rmtree(folder, ignore_errors=True)
    if name == "cifar100":
        unpack(archive, raw, MEMBERS.__contains__, source.unpacked, source.members)
        write_cifar(raw, whole)
        return whole
    unpack(archive, whole, _is_picture, source.unpacked, source.members)
    train, test = read_lists(name, lists)
    below = (whole, *sorted(whole.glob("*/")), *sorted(whole.glob("*/*/")))
    for folder in below:
        if find_layout(name, folder, train[0][0], test[0][0]) is not None:
            return folder
    raise DatasetError(
        f"{archive} holds the pictures of {name} in none of the layouts that `python -m tasks.datasets --help` lists"
    )


def _is_picture(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _seal(name: str, root: Path, archive: Path | None, count: int) -> None:
    digests = {kind: file_digest(archive, kind) for kind in ("md5", "sha256")} if archive else {}
    write_json(
        root / STAMP,
        {"dataset": name, "archive": archive.name if archive else None, **digests, "pictures": count},
    )
