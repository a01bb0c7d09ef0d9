"""Prompts and images epoch by epoch: the paper's Figure 4 for any run, bounded in pictures.

For a few classes, a strip for each of a few methods: the same slots' images epoch by epoch, their prompt, and what
the VLM made of them. Of a long run only the sets that are shown are read, each once, and of those only the lines
of the classes that are shown.
"""

import base64
import io
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from PIL import Image

from flows.results import OURS, Run
from tasks.images import READ_FORMATS
from tasks.records import AugmentedImage, Frozen, Level, Verdict
from tasks.store import StoreError
from tasks.text import one_line, readable
from tasks.tracked import CAPTION_CHARS

CLASSES = 6  # of all datasets together, but at least one of each
METHODS_SHOWN = 6  # of each dataset: ours and the ablation's first, see PREFERRED
CARDS_PER_STRIP = 10
IMAGES_PER_CARD = 3
SIDE = 96  # pixels; larger images are made smaller before they are embedded
PICTURE_BYTES = 3_500  # of an embedded picture, about; so all of them together stay below 5 MB
PREFERRED = (OURS, "sd_vlm", "vlm", "fixed_sd", "first", "random")

Line = TypeVar("Line", AugmentedImage, Verdict)


class Picture(Frozen):
    """An embedded image and what to say where it cannot be seen."""

    uri: str
    alt: str


class Card(Frozen):
    """One class in one set A_k of one session. ``level`` is the verdict on the first picture, if any."""

    session: int
    epoch: int
    pictures: tuple[Picture, ...]
    prompt: str
    rewritten: bool
    level: Level | Literal["none"]
    inherited: bool
    caption_generated: str
    caption_original: str


class Strip(Frozen):
    """One method's cards of one class."""

    method: str
    seed: int
    finished: bool
    cards: tuple[Card, ...]

    @property
    def judged(self) -> bool:
        """Whether a VLM judged any of them."""
        return any(card.level != "none" for card in self.cards)


class ShownClass(Frozen):
    """One class of one dataset with the methods that drew images for it."""

    dataset: str
    name: str
    session: int
    strips: tuple[Strip, ...]


class SetPlace(Frozen):
    """Where one set A_k of a run lies, and where the verdicts on it would be. ``epoch`` is k."""

    session: int
    epoch: int
    folder: Path
    judged: Path


class DrawnSet(Frozen):
    """What one set holds of the classes asked for: images by class and slot, verdicts by image id."""

    place: SetPlace
    images: dict[str, dict[str, AugmentedImage]]
    verdicts: dict[str, Verdict]


# ------------------------------------------------------------------------------------------ choosing


def shown_classes(runs: Sequence[Run]) -> list[ShownClass]:
    """Pick a few classes and methods of each dataset and collect their strips, each from a method's lowest seed.

    Raises:
        StoreError: a line of a manifest or a verdict file does not parse.
    """
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    each = max(1, CLASSES // len(datasets))
    found: list[ShownClass] = []
    for dataset in datasets:
        chosen = pick_methods([run for run in runs if run.dataset == dataset])
        ours_first = sorted(chosen, key=lambda run: run.method != OURS)
        classes = pick_classes([set_places(run.folder) for run in ours_first[:2]], each)
        strips = {run.method: _strips(run, classes) for run in chosen}
        for name, session in classes:
            kept = tuple(strips[run.method][name] for run in chosen if strips[run.method][name].cards)
            found.append(ShownClass(dataset=dataset, name=name, session=session, strips=kept))
    return found


def pick_methods(runs: Sequence[Run]) -> list[Run]:
    """The lowest seed of each method that drew images; a few methods, in the order of the runs."""
    first: dict[str, Run] = {}
    for run in runs:
        if run.method not in first and set_places(run.folder):
            first[run.method] = run
    wanted = [method for method in PREFERRED if method in first]
    wanted += [method for method in first if method not in PREFERRED]
    return [run for method, run in first.items() if method in wanted[:METHODS_SHOWN]]


def set_places(folder: Path) -> list[SetPlace]:
    """All sets of a run, session by session and epoch by epoch; nothing is read."""
    found = []
    for session in sorted(folder.glob("session-*"), key=_number):
        epochs = sorted(session.glob("epoch-*"), key=_number)
        for epoch, place in [(0, session / "initial"), *((_number(path) + 1, path) for path in epochs)]:
            if (place / "manifest.jsonl").is_file():
                judged = session / f"epoch-{epoch:03d}" / "verdicts.jsonl"
                found.append(SetPlace(session=_number(session), epoch=epoch, folder=place, judged=judged))
    return found


def _number(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


def pick_classes(runs: Sequence[Sequence[SetPlace]], most: int) -> list[tuple[str, int]]:
    """Classes to show and the session that brought each: of every session in turn, those whose prompts changed most.

    Only the first and the last set of a session are looked at, and of a class those of its own session.
    """
    first: dict[str, tuple[int, int]] = {}
    prompts: dict[str, set[str]] = defaultdict(set)
    for place in (place for places in runs for place in ends(places)):
        for row in read_some(place.folder / "manifest.jsonl", AugmentedImage, None):
            name = _class_name(row)
            first[name] = min(first.get(name, (place.session, row.label)), (place.session, row.label))
            if place.session == first[name][0]:
                prompts[name].add(row.prompt)
    by_session: dict[int, list[str]] = defaultdict(list)
    for name in sorted(first, key=lambda name: (-len(prompts[name]), first[name])):
        by_session[first[name][0]].append(name)
    turns = sorted((turn, session) for session, names in by_session.items() for turn in range(len(names)))
    chosen = [by_session[session][turn] for turn, session in turns[:most]]
    return [(name, first[name][0]) for name in sorted(chosen, key=first.__getitem__)]


def ends(places: Sequence[SetPlace]) -> list[SetPlace]:
    """The first and the last set of each session."""
    last = {place.session: place for place in places}
    first = {place.session: place for place in reversed(places)}
    return [place for place in places if place in (first[place.session], last[place.session])]


Item = TypeVar("Item")


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """All items if they are few; else the first half of as many as fit, and the last of equal parts of the rest."""
    if len(items) <= most:
        return list(items)
    front = most // 2
    rest, parts = items[front:], most - front
    return [*items[:front], *(rest[len(rest) * (n + 1) // parts - 1] for n in range(parts))]


def fitting(places: Sequence[SetPlace], session: int) -> list[SetPlace]:
    """A class's sets to show: of those of its own session and the last of each later one, as many as fit."""
    last = {place.session: place for place in places}
    own = [place for place in places if place.session == session]
    return spread([*own, *(place for later, place in last.items() if later > session)], CARDS_PER_STRIP)


# ------------------------------------------------------------------------------------------ reading


def read_some(path: Path, kind: type[Line], having: Collection[str] | None) -> Iterator[Line]:
    """The lines of a file that contain one of some texts, or all of them; the others are not parsed.

    Raises:
        StoreError: such a line does not parse; the message names the file and the line.
    """
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
        if line and (having is None or any(text in line for text in having)):
            try:
                yield kind.model_validate_json(line)
            except ValueError as error:
                raise StoreError(f"{path}, line {number}, is not a {kind.__name__}: {error}") from error


def drawn_set(place: SetPlace, classes: Collection[str]) -> DrawnSet:
    """Read what a set holds of some classes."""
    images: dict[str, dict[str, AugmentedImage]] = {name: {} for name in classes}
    written = [json.dumps(name, ensure_ascii=False)[1:-1] for name in classes]
    for row in read_some(place.folder / "manifest.jsonl", AugmentedImage, written):
        if (name := _class_name(row)) in images:
            images[name][row.slot] = row
    ids = {row.id for rows in images.values() for row in rows.values()}
    labels = {f'"label":{row.label},' for rows in images.values() for row in rows.values()}
    judged = (verdict for verdict in read_some(place.judged, Verdict, labels) if verdict.augmented_id in ids)
    return DrawnSet(
        place=place, images=images, verdicts={verdict.augmented_id: verdict for verdict in judged}
    )


def _class_name(row: AugmentedImage) -> str:
    return row.path.split("/", 1)[0]


# ------------------------------------------------------------------------------------------ strips


def _strips(run: Run, classes: Sequence[tuple[str, int]]) -> dict[str, Strip]:
    """A run's strip of each class; each set is read once for all of them."""
    places = set_places(run.folder)
    wanted: dict[SetPlace, list[str]] = {}
    for name, session in classes:
        for place in fitting(places, session):
            wanted.setdefault(place, []).append(name)
    sets = {place: drawn_set(place, wanted[place]) for place in places if place in wanted}
    strips = {}
    for name, _ in classes:
        own = [one for one in sets.values() if one.images.get(name)]
        cards = tuple(_cards(own, name))
        strips[name] = Strip(method=run.method, seed=run.seed, finished=run.record is not None, cards=cards)
    return strips


def _cards(sets: Sequence[DrawnSet], name: str) -> Iterator[Card]:
    before = ""
    for one in sets:
        members = one.images[name]
        slots = lead_slots([other for other in sets if other.place.session == one.place.session], name)
        card = _card(one, [members[slot] for slot in slots if slot in members], before)
        before = card.prompt
        yield card


def lead_slots(sets: Sequence[DrawnSet], name: str) -> list[str]:
    """The slots to follow through a session: first those whose prompts change most, then the judged ones."""
    prompts: dict[str, set[str]] = defaultdict(set)
    judged: dict[str, int] = defaultdict(int)
    for one in sets:
        for slot, row in one.images[name].items():
            prompts[slot].add(row.prompt)
            verdict = one.verdicts.get(row.id)
            judged[slot] += 0 if verdict is None else 1 + (verdict.inherited_from is None)
    return sorted(prompts, key=lambda slot: (-len(prompts[slot]), -judged[slot], slot))[:IMAGES_PER_CARD]


def _card(drawn: DrawnSet, rows: Sequence[AugmentedImage], before: str) -> Card:
    lead = rows[0]
    verdict = drawn.verdicts.get(lead.id)
    decisive = sorted(verdict.comparisons, key=lambda c: c.answer != "different")[:1] if verdict else []
    return Card(
        session=drawn.place.session,
        epoch=drawn.place.epoch,
        pictures=tuple(_picture(drawn.place, row) for row in rows),
        prompt=readable(lead.prompt, CAPTION_CHARS),
        rewritten=bool(before) and lead.prompt != before,
        level=verdict.level if verdict else "none",
        inherited=verdict is not None and verdict.inherited_from is not None,
        caption_generated=readable(decisive[0].caption_augmented, CAPTION_CHARS) if decisive else "",
        caption_original=readable(decisive[0].caption_original, CAPTION_CHARS) if decisive else "",
    )


def _picture(place: SetPlace, row: AugmentedImage) -> Picture:
    alt = f"Generated {_class_name(row)}, session {place.session}, epoch {place.epoch}: {row.prompt}"
    return Picture(uri=embedded(place.folder / "images" / row.path), alt=one_line(alt, CAPTION_CHARS))


def embedded(path: Path) -> str:
    """A picture as a data URI: as it is if small, else scaled down to ``SIDE`` pixels and packed as WebP."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data), formats=READ_FORMATS) as image:
        if max(image.size) <= SIDE and len(data) <= PICTURE_BYTES:
            return data_uri(data, "image/png")
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    for quality in (80, 55, 30):
        out = io.BytesIO()
        small.save(out, "WEBP", quality=quality)
        if out.tell() <= PICTURE_BYTES:
            break
    return data_uri(out.getvalue(), "image/webp")


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as an address that holds them."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
