"""Pictures of a data set: how a class is shared out, and the one look that each picture gets.

Every picture that is drawn is decoded once and its digest taken. With a cache, that is remembered by path, size and
time of the last change, so that a later start only asks the file system.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError
from tqdm import tqdm

from tasks.datasets.settings import DatasetError, DatasetSettings
from tasks.images import load_pixels
from tasks.records import Digest, ImageRef
from tasks.store import StoreError, digest_of, read_json, write_json

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SAVE_EVERY = 5_000
"""Pictures looked at between two writes of the cache."""


RULES = 2
"""Raised when a picture may be refused that was not before: what was looked at by other rules is looked at again."""


class Picture(NamedTuple):
    """A picture before it was looked at: its id, unique in the data set, and its path relative to the root."""

    id: str
    path: str


class Draw(NamedTuple):
    """One class's pictures, each role sorted by id."""

    train: tuple[Picture, ...]
    val: tuple[Picture, ...]
    test: tuple[Picture, ...]


class Roles(NamedTuple):
    """One class's pictures, looked at."""

    train: tuple[ImageRef, ...]
    val: tuple[ImageRef, ...]
    test: tuple[ImageRef, ...]


# ---------------------------------------------------------------------------------------- sharing out


def cut_class(
    settings: DatasetSettings,
    label: int,
    name: str,
    pool: Sequence[Picture],
    val: Sequence[Picture] | None,
    tests: Sequence[Picture],
) -> Draw:
    """Share out one class: a few-shot class has no validation pictures of its own.

    Args:
        settings: Shots, share that is held out and test pictures.
        label: The class's, which says whether it is a base class.
        name: The class's, for the error.
        pool: Training pictures in the order in which they are drawn.
        val: Validation pictures where the data set has its own; None holds some of the pool out.
        tests: Test pictures in the order in which they are drawn.

    Raises:
        DatasetError: Too few pictures for one of the roles.
    """
    is_base = label < settings.n_base
    wanted = settings.base_shots if is_base else settings.k_shot
    holds_out = is_base and val is None
    if holds_out and wanted == 1:
        raise DatasetError(
            "dataset.base_shots=1: a base class trains on one picture and holds one out; raise it to 2, or add val/"
        )
    least = max(wanted or 1, 2 if holds_out else 1)  # a base class trains on one and holds one out
    if len(pool) < least:
        raise _too_few(name, "training", len(pool), least)
    if is_base and val is not None and not val:
        raise _too_few(name, "validation", 0, 1)
    if len(tests) < (settings.test_per_class or 1):
        raise _too_few(name, "test", len(tests), settings.test_per_class or 1)
    shots = pool[:wanted]
    n_val = min(len(shots) - 1, max(1, round(settings.holdout * len(shots)))) if holds_out else 0
    held = val if is_base and val is not None else shots[:n_val]
    parts = (shots[n_val:], held, tests[: settings.test_per_class])
    return Draw(*(tuple(sorted(part)) for part in parts))


def _too_few(name: str, kind: str, has: int, needs: int) -> DatasetError:
    remedies = {
        "training": "lower dataset.base_shots or dataset.k_shot",
        "validation": "remove val/",
        "test": "lower dataset.test_per_class",
    }
    return DatasetError(
        f"the class {name!r} has {has} {kind} pictures ({', '.join(SUFFIXES)}), but {needs} are needed; "
        f"add some or {remedies[kind]}"
    )


# ---------------------------------------------------------------------------------------- looking


def look_at(root: Path, draws: Sequence[Draw], cache: Path | None) -> list[Roles]:
    """Decode every picture, or find in the cache that it was decoded, and take its digest.

    Raises:
        UnreadableImageError: Names the first picture that cannot be read.
    """
    paths = [picture.path for draw in draws for role in draw for picture in role]
    digests = _digests(root, paths, cache)
    return [
        Roles(
            *(
                tuple(ImageRef(id=id_, path=path, digest=digests[path], label=label) for id_, path in role)
                for role in draw
            )
        )
        for label, draw in enumerate(draws)
    ]


def _digests(root: Path, paths: Sequence[str], cache: Path | None) -> dict[str, Digest]:
    memory = cache / f"{_place(root)}-{RULES}.json" if cache else None
    known = _remembered(memory)
    stamps = {path: _stamp(root / path) for path in paths}
    fresh = [path for path in paths if path not in known or known[path][:2] != stamps[path]]
    try:
        for n, (path, digest) in enumerate(_looked_at(root, fresh), start=1):
            known[path] = (*stamps[path], digest)
            if n % SAVE_EVERY == 0:
                _remember(memory, known)
    finally:
        if fresh:
            _remember(memory, known)
    return {path: Digest(known[path][2]) for path in paths}


def _looked_at(root: Path, paths: list[str]) -> Iterator[tuple[str, str]]:
    def look(path: str) -> tuple[str, str]:
        load_pixels(root / path, None)
        return path, digest_of(root / path)

    with ThreadPoolExecutor() as pool:  # the bar is for those who wait at a terminal
        bar = tqdm(total=len(paths), desc=f"checking {root.name}", unit="picture", disable=None, delay=2)
        for looked in pool.map(look, paths):
            bar.update()
            yield looked
        bar.close()


Looked = tuple[int, int, str]
"""Size in bytes, time of the last change in nanoseconds, digest."""


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of the last change; zeros for what is not there, which is then looked at and refused."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _place(root: Path) -> str:
    return hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:24]


def _remembered(memory: Path | None) -> dict[str, Looked]:
    """What was looked at before; a file that cannot be read is as good as none."""
    if memory is None or not memory.is_file():
        return {}
    try:
        return TypeAdapter(dict[str, Looked]).validate_python(read_json(memory))
    except (StoreError, ValidationError):
        return {}


def _remember(memory: Path | None, known: dict[str, Looked]) -> None:
    if memory is not None:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_json(memory, known)


# ---------------------------------------------------------------------------------------- checking


def refuse_twins(drawn: Sequence[Roles]) -> None:
    """One picture may stand once: not in two roles, and not under two labels. Nor may an id.

    Raises:
        DatasetError: Names both.
    """
    first: dict[str, tuple[int, str, ImageRef]] = {}
    paths: dict[str, str] = {}
    for roles in drawn:
        for role, images in zip(("training", "validation", "test"), roles, strict=True):
            for image in images:
                if (twin := paths.setdefault(image.id, image.path)) != image.path:
                    raise DatasetError(
                        f"{image.path} and {twin} are both called {image.id!r}; rename one of the two"
                    )
                label, other_role, other = first.setdefault(image.digest, (image.label, role, image))
                if (label, other_role) != (image.label, role):
                    raise DatasetError(
                        f"{image.path} ({role}) is the same picture as {other.path} ({other_role}); "
                        f"remove one of the two"
                    )
