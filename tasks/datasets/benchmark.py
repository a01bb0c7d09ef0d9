"""Cut a folder of pictures into FSCIL sessions (paper, Experiment Settings and Table 2; Tao et al. 2020).

Two layouts are read: ``<root>/{train,test}/<class>/<picture>``, or ``<root>/<class>/<picture>``, of which
a fifth of each class, chosen by ``split_seed``, is set aside for testing.

Session 0 has ``n_base`` classes; each later one adds ``n_way`` classes of ``k_shot`` pictures. FSCIL has no
validation split and the test pictures may not steer anything, so the base session holds out a share of its
own training pictures, and the few-shot sessions leave one shot out at a time. Session t is tested on all
classes seen so far. Which pictures are drawn depends on ``split_seed`` and the file names alone: it is the
same for every run, and adding a picture moves few others.

All that can be wrong with the data is said here, in one sentence, before anything is computed.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import Field

from tasks.images import load_image
from tasks.records import Benchmark, Frozen, ImageRef, Session
from tasks.seeding import seed_for
from tasks.store import digest_of

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
TEST_SHARE = 0.2


class DatasetError(ValueError):
    """The data and the settings do not fit; the message names the value and the remedy."""


class DatasetSettings(Frozen):
    """What to read and how to cut it.

    Attributes:
        name: Of the data set; stands in records and in ``make data DATASET=<name>``. ``<name>_dev`` is cut from the
            training pictures of ``<name>`` alone, for choosing settings.
        root: Folder in one of the two layouts.
        n_base: Classes of the base session, at least 2.
        n_way: New classes of each later session.
        k_shot: Training pictures of each new class.
        n_sessions: How many sessions follow the base session; 0 is plain classification.
        base_shots: Pictures of each base class, held-out ones included; None takes all.
        test_per_class: Test pictures of each class; None takes all.
        holdout: Share of the base classes' pictures that validates, in (0, 1); at least one of each class.
        class_order: Folder names in the order in which classes come; None sorts them. Others are ignored.
        class_names: Word for prompts by folder name; None, or a folder not listed, takes the folder's name
            with blanks for underscores.
        size: Side in pixels at which pictures are loaded.
        split_seed: Decides which pictures are drawn; not the run's seed.
    """

    name: str
    root: Path
    n_base: int
    n_way: int = Field(ge=1)
    k_shot: int = Field(ge=1)
    n_sessions: int = Field(ge=0)
    base_shots: int | None
    test_per_class: int | None
    holdout: float = Field(gt=0, lt=1)
    class_order: tuple[str, ...] | None
    class_names: dict[str, str] | None
    size: int = Field(ge=1)
    split_seed: int

    @property
    def n_classes(self) -> int:
        """Classes of all sessions together."""
        return self.n_base + self.n_way * self.n_sessions


def build_benchmark(settings: DatasetSettings) -> Benchmark:
    """Read the folder, draw the shots, check every picture that was drawn, and cut the sessions.

    Raises:
        DatasetError: Missing or empty folder, too few classes or pictures, equal class names, an
            unreadable picture (``UnreadableImageError``, also a ValueError), or one picture in two roles.
    """
    if settings.n_base < 2:
        raise DatasetError(f"dataset.n_base={settings.n_base}: the base session needs at least 2 classes")
    folders = _choose_classes(settings, _class_folders(settings))
    names = _prompt_names(settings, folders)
    drawn = [_draw(settings, label, folder) for label, folder in enumerate(folders)]
    _refuse_unreadable(settings.root, [image for roles in drawn for role in roles for image in role])
    _refuse_twins(drawn)
    return Benchmark(
        dataset=settings.name,
        class_names=names,
        n_base=settings.n_base,
        n_way=settings.n_way,
        k_shot=settings.k_shot,
        split_rule=_split_rule(settings),
        sessions=tuple(_session(settings, index, drawn) for index in range(settings.n_sessions + 1)),
    )


# ---------------------------------------------------------------------------------------- classes


def _class_folders(settings: DatasetSettings) -> list[str]:
    """Names of the class folders that hold pictures, sorted."""
    root = settings.root
    if not root.is_dir():
        raise DatasetError(
            f"no data at {root}: run `make data DATASET={settings.name.removesuffix('_dev')}`, "
            f"or name a folder with dataset.root="
        )
    if (root / "train").is_dir() != (root / "test").is_dir():
        there, missing = ("train", "test") if (root / "train").is_dir() else ("test", "train")
        raise DatasetError(
            f"{root} has {there}/ but no {missing}/: add it, or put the class folders directly into {root}"
        )
    parent = root / "train" if _is_split(root) else root
    names = [path.name for path in sorted(parent.iterdir()) if path.is_dir() and any(_pictures(path))]
    if not names:
        raise DatasetError(
            f"{parent} holds no class folder with pictures: expected {root}/train/<class>/<picture> and "
            f"{root}/test/<class>/<picture>, or {root}/<class>/<picture>"
        )
    return names


def _choose_classes(settings: DatasetSettings, found: list[str]) -> list[str]:
    order = list(settings.class_order) if settings.class_order is not None else found
    if absent := [name for name in order if name not in found]:
        raise DatasetError(f"dataset.class_order names {absent[0]!r}, but {settings.root} has no such class")
    if repeated := _first_repeated(order):
        raise DatasetError(f"dataset.class_order names {repeated!r} twice; leave one out")
    if settings.n_classes > len(order):
        raise DatasetError(
            f"dataset {settings.name} has {len(order)} classes, but n_base={settings.n_base} + n_way="
            f"{settings.n_way} x n_sessions={settings.n_sessions} needs {settings.n_classes}; lower one"
        )
    return order[: settings.n_classes]


def _prompt_names(settings: DatasetSettings, folders: list[str]) -> tuple[str, ...]:
    given = settings.class_names or {}
    names = tuple(given.get(folder, folder.replace("_", " ")).strip() for folder in folders)
    if repeated := _first_repeated([name.casefold() for name in names]):
        twins = [f for f, name in zip(folders, names, strict=True) if name.casefold() == repeated]
        raise DatasetError(
            f"the classes {twins[0]!r} and {twins[1]!r} have one name, {repeated!r}; "
            f"give each its own in dataset.class_names"
        )
    for folder, name in zip(folders, names, strict=True):
        if not name or not name.isprintable() or "/" in name or "\\" in name:
            raise DatasetError(
                f"the class {folder!r} has the name {name!r}, which is empty or holds a slash or a control "
                f"character; give it another in dataset.class_names"
            )
    return names


def _first_repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


# ---------------------------------------------------------------------------------------- drawing


Roles = tuple[tuple[ImageRef, ...], tuple[ImageRef, ...], tuple[ImageRef, ...]]
"""One class's training, validation and test pictures."""


def _draw(settings: DatasetSettings, label: int, folder: str) -> Roles:
    """Draw the pictures of one class: a few-shot class has no validation pictures of its own."""
    pool, tests = _pools(settings, folder)
    is_base = label < settings.n_base
    wanted = settings.base_shots if is_base else settings.k_shot
    least = 2 if is_base else 1  # a base class trains on one and holds one out
    if len(pool) < max(wanted or least, least):
        raise _too_few(folder, "training", len(pool), max(wanted or least, least))
    if len(tests) < (settings.test_per_class or 1):
        raise _too_few(folder, "test", len(tests), settings.test_per_class or 1)
    shots = pool[:wanted]
    n_val = min(len(shots) - 1, max(1, round(settings.holdout * len(shots)))) if is_base else 0
    parts = (shots[n_val:], shots[:n_val], tests[: settings.test_per_class])
    train, val, test = (tuple(_ref(settings.root, path, label) for path in sorted(part)) for part in parts)
    return train, val, test


def _too_few(folder: str, kind: str, has: int, needs: int) -> DatasetError:
    field = {"training": "dataset.base_shots or dataset.k_shot", "test": "dataset.test_per_class"}[kind]
    return DatasetError(
        f"the class {folder!r} has {has} {kind} pictures ({', '.join(SUFFIXES)}), but {needs} are needed; "
        f"add some or lower {field}"
    )


def _pools(settings: DatasetSettings, folder: str) -> tuple[list[Path], list[Path]]:
    """A class's training and test pictures, each in the order in which they are drawn."""
    root = settings.root
    if _is_split(root):
        train, test = (_shuffled(settings, root / split / folder) for split in ("train", "test"))
        return train, test
    pool = _shuffled(settings, root / folder)
    n_test = max(1, round(TEST_SHARE * len(pool)))
    return pool[:-n_test], pool[-n_test:]


def _shuffled(settings: DatasetSettings, folder: Path) -> list[Path]:
    def key(path: Path) -> int:
        return seed_for(settings.split_seed, "split", path.relative_to(settings.root).as_posix())

    return sorted(_pictures(folder), key=key)


def _pictures(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
                yield path


def _is_split(root: Path) -> bool:
    return (root / "train").is_dir()


def _ref(root: Path, path: Path, label: int) -> ImageRef:
    relative = path.relative_to(root).as_posix()
    return ImageRef(id=relative.replace("/", "-"), path=relative, digest=digest_of(path), label=label)


# ---------------------------------------------------------------------------------------- checks and sessions


def _refuse_unreadable(root: Path, refs: list[ImageRef]) -> None:
    def check(ref: ImageRef) -> None:
        load_image(root / ref.path, None)

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(check, refs):
            pass


def _refuse_twins(drawn: list[Roles]) -> None:
    """One picture may stand once: not in two roles, and not under two labels. Nor may an id."""
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


def _session(settings: DatasetSettings, index: int, drawn: list[Roles]) -> Session:
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
    )


def _split_rule(settings: DatasetSettings) -> str:
    base = "all" if settings.base_shots is None else settings.base_shots
    tests = "all" if settings.test_per_class is None else settings.test_per_class
    return (
        f"split_seed {settings.split_seed}: {base} pictures of each base class, {settings.holdout:g} of them "
        f"held out; {settings.k_shot} shots of each new class, left out one at a time; {tests} test pictures"
    )
