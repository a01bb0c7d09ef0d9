"""Cut a data set into FSCIL sessions (paper, Experiment Settings and Table 2; Tao et al. 2020).

Session 0 has ``n_base`` classes; each later one adds ``n_way`` classes of ``k_shot`` pictures. Which pictures
those are is read from the published lists, where ``splits`` names them, and drawn by seed from any other folder.
FSCIL has no validation split and the test pictures may not steer anything, so the base session holds out a share
of its own training pictures, and the few-shot sessions leave one shot out at a time. Session t is tested on all
classes seen so far.

All that can be wrong with the data is said here, in one sentence, before anything is computed.
"""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

from tasks.datasets.folders import draw_folders, first_repeated
from tasks.datasets.lists import PUBLISHED
from tasks.datasets.pictures import Roles, look_at, refuse_twins
from tasks.datasets.published import draw_published, part_twins, shared_pictures
from tasks.datasets.settings import DatasetError, DatasetSettings
from tasks.records import Benchmark, Session

LONGEST_NAME = 255
"""Of a class, in bytes of UTF-8: what file systems take."""

__all__ = ["DatasetError", "DatasetSettings", "build_benchmark"]


def build_benchmark(settings: DatasetSettings, cache: Path | None = None) -> Benchmark:
    """Read the folder, draw the shots, check every picture that was drawn, and cut the sessions.

    Args:
        settings: What to read and how to cut it.
        cache: Folder where the digests of checked pictures are kept, so that a second call looks only at those
            whose size or time has changed; None looks at all.

    Raises:
        DatasetError: Missing or empty folder, lists that are not the published ones, too few classes or pictures,
            equal class names, an unreadable picture (``UnreadableImageError``, also a ValueError), or one picture in
            two roles.
    """
    if settings.n_base < 2:
        raise DatasetError(f"dataset.n_base={settings.n_base}: the base session needs at least 2 classes")
    if settings.splits is None and settings.name in PUBLISHED:
        raise DatasetError(
            f"dataset={settings.name} is cut by its published lists: name their folder with dataset.splits=, or use "
            f"dataset=imagefolder dataset.root={settings.root} for a cut by seed"
        )
    folders, draws = draw_folders(settings) if settings.splits is None else draw_published(settings)
    names = _prompt_names(settings, folders)
    drawn = look_at(settings.root, draws, cache)
    if settings.splits is None:
        refuse_twins(drawn)
    else:
        drawn = part_twins(drawn)
    return Benchmark(
        dataset=settings.name,
        class_names=names,
        n_base=settings.n_base,
        n_way=settings.n_way,
        k_shot=settings.k_shot,
        split_rule=_split_rule(settings, drawn),
        sessions=tuple(_session(settings, index, drawn) for index in range(settings.n_sessions + 1)),
    )


def _prompt_names(settings: DatasetSettings, folders: list[str]) -> tuple[str, ...]:
    given = settings.class_names or {}
    names = tuple(given.get(folder, folder.replace("_", " ")).strip() for folder in folders)
    read = [_as_read(name) for name in names]
    if repeated := first_repeated(read):
        twins = [f for f, name in zip(folders, read, strict=True) if name == repeated]
        raise DatasetError(
            f"the classes {twins[0]!r} and {twins[1]!r} have one name, {repeated!r}; "
            f"give each its own in dataset.class_names"
        )
    for folder, name in zip(folders, names, strict=True):
        if not name.isprintable() or not _names_a_folder(name):
            raise DatasetError(
                f"the class {folder!r} has the name {name!r}, which is empty or too long, begins with a dot, or "
                f"holds a slash or a control character; give it another in dataset.class_names"
            )
    return names


def _as_read(name: str) -> str:
    """What is left of a name without what the eye does not tell apart: case, blanks, ways to write an accent."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def _names_a_folder(name: str) -> bool:
    """Whether generated images can lie in a visible folder of this name, below the one that it is put in."""
    return 0 < len(name.encode()) <= LONGEST_NAME and not name.startswith(".") and not {"/", "\\"} & {*name}


def _session(settings: DatasetSettings, index: int, drawn: Sequence[Roles]) -> Session:
    seen = settings.n_base + settings.n_way * index
    new = range(0 if index == 0 else seen - settings.n_way, seen)
    return Session(
        index=index,
        new_classes=tuple(new),
        seen_classes=tuple(range(seen)),
        train=tuple(image for label in new for image in drawn[label][0]),
        val=tuple(image for label in new for image in drawn[label][1]),
        test=tuple(image for label in range(seen) for image in drawn[label][2]),
        val_rule="holdout" if index == 0 else "leave_one_out",
        published=settings.splits is not None,
    )


def _split_rule(settings: DatasetSettings, drawn: Sequence[Roles]) -> str:
    base = "all" if settings.base_shots is None else settings.base_shots
    tests = "all" if settings.test_per_class is None else settings.test_per_class
    held = "val/ validates" if (settings.root / "val").is_dir() else f"{settings.holdout:g} of them held out"
    rule = (
        f"split_seed {settings.split_seed}: {base} pictures of each base class, {held}; "
        f"{settings.k_shot} shots of each new class, left out one at a time; {tests} test pictures"
    )
    if settings.splits is None:
        return rule
    return f"published lists, {rule}; {shared_pictures(drawn)} training pictures stand among the test pictures too"
