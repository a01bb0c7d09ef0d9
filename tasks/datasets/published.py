"""CUB-200, CIFAR-100 and miniImageNet with the sessions that every paper uses (Tao et al., CVPR 2020).

The lists say which classes come when, which pictures are the shots and which test; their digests are checked, and
what follows from them - class order, disjoint classes, five shots - is checked again with the pictures on disk.
Nothing of it is for a seed to decide but which base pictures are held out for validation.

These data sets hold some pictures twice, here and there on both sides of the split. The protocol keeps them, and so
does this; but none that is held out for validation has a twin anywhere, so that mining sees no test picture.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tasks.datasets.layouts import Locate, find_layout
from tasks.datasets.lists import K_SHOT, PUBLISHED, read_lists
from tasks.datasets.pictures import Draw, Picture, Roles, cut_class
from tasks.datasets.settings import DatasetError, DatasetSettings
from tasks.seeding import seed_for

Classes = dict[str, list[Picture]]
"""Pictures by class folder, in the lists' order."""


class Place(NamedTuple):
    """Where a data set of ``PUBLISHED`` is said to be: its pictures and its lists."""

    name: str
    root: Path
    splits: Path


def count_pictures(place: Place) -> int:
    """Look for every picture that the lists name, and count them. Opens none.

    Raises:
        DatasetError: Lists that are not the published ones, no layout that is known, or a picture that is missing.
    """
    sides = read_classes(place)
    pictures = [picture for side in sides for found in side.values() for picture in found]
    _refuse_missing(place, pictures)
    return len(pictures)


def draw_published(settings: DatasetSettings) -> tuple[list[str], list[Draw]]:
    """Take what the lists name.

    Returns:
        The class folders in label order, and what was drawn of each.

    Raises:
        DatasetError: Settings, lists or pictures that do not fit; nothing was decoded then.
    """
    assert settings.splits is not None, "asked for only where lists are named"
    _refuse_other_cut(settings)
    place = Place(settings.name, settings.root, settings.splits)
    train, test = read_classes(place)
    folders = sorted(train)[: settings.n_classes]
    draws = [
        cut_class(settings, label, folder, _ordered(settings, train[folder]), None, test[folder])
        for label, folder in enumerate(folders)
    ]
    _refuse_missing(place, [picture for draw in draws for role in draw for picture in role])
    return folders, draws


def _refuse_other_cut(settings: DatasetSettings) -> None:
    if (known := PUBLISHED.get(settings.name)) is None:
        raise DatasetError(
            f"dataset.splits is for {', '.join(sorted(PUBLISHED))}, not for {settings.name}: put its pictures into "
            f"train/ and test/ to say which are which"
        )
    wanted = {"n_base": known.n_base, "n_way": known.n_way, "k_shot": K_SHOT, "class_order": None}
    for field, value in wanted.items():
        if (given := getattr(settings, field)) != value:
            raise DatasetError(
                f"dataset.{field}={given} does not fit the published lists of {settings.name}, which have {value}; "
                f"for another cut use dataset=imagefolder dataset.root=<train and test folders>"
            )
    if settings.n_sessions > known.n_sessions:
        raise DatasetError(
            f"dataset.n_sessions={settings.n_sessions}, but the published lists of {settings.name} end after "
            f"{known.n_sessions}; lower it"
        )


def _ordered(settings: DatasetSettings, pool: list[Picture]) -> list[Picture]:
    """The order in which held-out pictures are drawn: by id, so that it is one for all layouts."""
    return sorted(pool, key=lambda picture: seed_for(settings.split_seed, "split", picture.id))


# ---------------------------------------------------------------------------------------- lists and folders


def read_classes(place: Place) -> tuple[Classes, Classes]:
    """All training and all test pictures by class, checked session by session.

    Raises:
        DatasetError: Lists that are not the published ones, or pictures in an unknown layout or another order.
    """
    if not place.root.is_dir():
        raise DatasetError(f"no data at {place.root}: {_remedy(place)}")
    train, test = read_lists(place.name, place.splits)
    locate = find_layout(place.name, place.root, train[0][0], test[0][0])
    if locate is None:
        raise DatasetError(
            f"{place.root} holds the pictures of {place.name} in none of the layouts that "
            f"`python -m tasks.datasets --help` lists: {_remedy(place)}"
        )
    sides: list[Classes] = []
    for split, lines in (("train", train), ("test", test)):
        sessions = [_located(place, locate, split, session) for session in lines]
        _refuse_disorder(place, split, sessions)
        sides.append({folder: found for session in sessions for folder, found in session.items()})
    return sides[0], sides[1]


def _located(place: Place, locate: Locate, split: str, lines: Sequence[str]) -> Classes:
    classes: Classes = {}
    for line in lines:
        if (found := locate(split, line)) is None:
            raise DatasetError(
                f"{place.root} lacks the {split} picture {line} of {place.name}: {_remedy(place)}"
            )
        classes.setdefault(found[0], []).append(found[1])
    return classes


def _refuse_disorder(place: Place, split: str, sessions: list[Classes]) -> None:
    """Classes come in the order of their sorted folders, each in one session, with five shots in later ones."""
    known = PUBLISHED[place.name]
    folders = sorted({folder for session in sessions for folder in session})
    for index, session in enumerate(sessions):
        end = known.n_base + known.n_way * index
        due = folders[0 if index == 0 else end - known.n_way : end]
        sizes = sorted({len(pictures) for pictures in session.values()})
        if sorted(session) != due or (split == "train" and index > 0 and sizes != [K_SHOT]):
            raise DatasetError(
                f"{place.root} is not in the order that the lists of {place.name} were made for: session {index + 1} "
                f"has {split} pictures of {', '.join(sorted(session)[:3])} ... ({sizes} of each), where "
                f"{', '.join(due[:3])} ... are due: {_remedy(place)}"
            )


def _refuse_missing(place: Place, pictures: Sequence[Picture]) -> None:
    missing = [picture.path for picture in pictures if not (place.root / picture.path).is_file()]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(pictures)} pictures of {place.name} are missing below {place.root}, the first "
            f"is {missing[0]}: {_remedy(place)}"
        )


def _remedy(place: Place) -> str:
    return f"run `make data DATASET={place.name}`, or name what is on disk with dataset.root= and dataset.splits="


# ---------------------------------------------------------------------------------------- twins


def part_twins(drawn: Sequence[Roles]) -> list[Roles]:
    """Give back for training what was held out for validation and stands in the data twice."""
    times = Counter(image.digest for roles in drawn for role in roles for image in role)
    parted = []
    for train, val, test in drawn:
        alone = tuple(image for image in val if times[image.digest] == 1)
        back = tuple(image for image in val if times[image.digest] > 1)
        parted.append(Roles(tuple(sorted((*train, *back), key=lambda image: image.id)), alone, test))
    return parted


def shared_pictures(drawn: Sequence[Roles]) -> int:
    """How many training pictures have the content of a test picture."""
    tests = {image.digest for roles in drawn for image in roles.test}
    return sum(image.digest in tests for roles in drawn for image in roles.train)
