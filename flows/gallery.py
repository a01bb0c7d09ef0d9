"""The gallery page: the paper's Figure 4 for any run, as one HTML file that needs nothing beside it.

For a few classes, a strip for each method: the same slots' images epoch by epoch, their prompt, and what the
VLM made of them. Text from records (class names, prompts, captions) is escaped; pictures are embedded.
"""

import base64
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from tasks.records import AugmentedImage, Frozen, Level, Verdict
from tasks.store import read_lines

if TYPE_CHECKING:
    from flows.report import Row, Run

CLASSES_PER_SESSION = 2
CLASSES_PER_DATASET = 8
IMAGES_PER_CARD = 3
CARDS_PER_STRIP = 24
SIDE = 160  # pixels; larger images are made smaller before they are embedded


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
    """One class of one dataset with all methods that drew images for it."""

    dataset: str
    name: str
    session: int
    strips: tuple[Strip, ...]


class DrawnSet(Frozen):
    """One set A_k of a run: its rows and the verdicts on it, by image id."""

    session: int
    epoch: int
    images: Path
    rows: tuple[AugmentedImage, ...]
    verdicts: dict[str, Verdict]

    def of_class(self, name: str) -> dict[str, AugmentedImage]:
        """The class's images by slot."""
        return {row.slot: row for row in self.rows if _class_name(row) == name}


def page(
    runs: "Sequence[Run]", rows: "Sequence[Row]", sentences: Sequence[str], charts: Mapping[str, bytes]
) -> str:
    """Render the page.

    Args:
        runs: runs in the table's order.
        rows: the table.
        sentences: comparisons, in words.
        charts: the curves as ``flows.curves.charts`` draws them.
    """
    from flows.report import HEADINGS, NOTE

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("gallery.html.jinja").render(
        headings=HEADINGS,
        rows=[row.texts for row in rows],
        note=NOTE,
        sentences=sentences,
        curves={name: _uri(chart, "image/svg+xml") for name, chart in charts.items()},
        classes=shown_classes(runs),
    )


def shown_classes(runs: "Sequence[Run]") -> list[ShownClass]:
    """Pick a few classes of each dataset and collect every method's strip, from its lowest seed."""
    found: list[ShownClass] = []
    for dataset in dict.fromkeys(run.dataset for run in runs):
        sets = {run.method: (run, drawn_sets(run.folder)) for run in reversed(runs) if run.dataset == dataset}
        sets = {method: sets[method] for method in reversed(sets) if sets[method][1]}
        for name, session in pick_classes([drawn for _, drawn in sets.values()]):
            strips = [_strip(run, drawn, name) for run, drawn in sets.values()]
            strips = [strip for strip in strips if strip.cards]
            found.append(ShownClass(dataset=dataset, name=name, session=session, strips=tuple(strips)))
    return found


def drawn_sets(folder: Path) -> list[DrawnSet]:
    """All sets of a run, session by session and epoch by epoch.

    Raises:
        StoreError: a manifest or verdict file does not parse.
    """
    found = []
    for session in sorted(folder.glob("session-*")):
        places = [(0, session / "initial")]
        places += [(_number(epoch) + 1, epoch) for epoch in sorted(session.glob("epoch-*"))]
        for epoch, place in places:
            if (place / "manifest.jsonl").is_file():
                found.append(_drawn_set(session, epoch, place))
    return found


def _drawn_set(session: Path, epoch: int, place: Path) -> DrawnSet:
    judged = session / f"epoch-{epoch:03d}" / "verdicts.jsonl"
    verdicts = read_lines(judged, Verdict) if judged.is_file() else []
    return DrawnSet(
        session=_number(session),
        epoch=epoch,
        images=place / "images",
        rows=tuple(read_lines(place / "manifest.jsonl", AugmentedImage)),
        verdicts={verdict.augmented_id: verdict for verdict in verdicts},
    )


def _number(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


def _class_name(row: AugmentedImage) -> str:
    return row.path.split("/", 1)[0]


def pick_classes(runs: Sequence[Sequence[DrawnSet]]) -> list[tuple[str, int]]:
    """Classes to show and the session that brought each: of a session those whose prompts changed most."""
    first: dict[str, tuple[int, int]] = {}
    prompts: dict[str, set[str]] = defaultdict(set)
    for drawn in runs:
        for one in drawn:
            for row in one.rows:
                name = _class_name(row)
                first[name] = min(first.get(name, (one.session, row.label)), (one.session, row.label))
                prompts[name].add(row.prompt)
    taken: dict[int, list[str]] = defaultdict(list)
    for name in sorted(first, key=lambda name: (-len(prompts[name]), first[name])):
        if len(taken[first[name][0]]) < CLASSES_PER_SESSION:
            taken[first[name][0]].append(name)
    chosen = sorted((name for names in taken.values() for name in names), key=first.__getitem__)
    return [(name, first[name][0]) for name in chosen[:CLASSES_PER_DATASET]]


# ------------------------------------------------------------------------------------------ strips


def _strip(run: "Run", drawn: Sequence[DrawnSet], name: str) -> Strip:
    sets = fitting([one for one in drawn if one.of_class(name)])
    cards = tuple(_cards(sets, name))
    return Strip(method=run.method, seed=run.seed, finished=run.record is not None, cards=cards)


def fitting(sets: list[DrawnSet]) -> list[DrawnSet]:
    """All sets if they are few; else those of the class's own session and the last of each later one."""
    if len(sets) <= CARDS_PER_STRIP:
        return sets
    last = {one.session: one for one in sets}
    own = [one for one in sets if one.session == sets[0].session]
    return (own + [one for session, one in last.items() if session != sets[0].session])[:CARDS_PER_STRIP]


def _cards(sets: Sequence[DrawnSet], name: str) -> Iterator[Card]:
    before = ""
    for one in sets:
        members = one.of_class(name)
        slots = lead_slots([other for other in sets if other.session == one.session], name)
        rows = [members[slot] for slot in slots if slot in members]
        card = _card(one, rows, before)
        before = card.prompt
        yield card


def lead_slots(sets: Sequence[DrawnSet], name: str) -> list[str]:
    """The slots to follow through a session: first those whose prompts change most, then the judged ones."""
    prompts: dict[str, set[str]] = defaultdict(set)
    judged: dict[str, int] = defaultdict(int)
    for one in sets:
        for slot, row in one.of_class(name).items():
            prompts[slot].add(row.prompt)
            verdict = one.verdicts.get(row.id)
            judged[slot] += 0 if verdict is None else 1 + (verdict.inherited_from is None)
    return sorted(prompts, key=lambda slot: (-len(prompts[slot]), -judged[slot], slot))[:IMAGES_PER_CARD]


def _card(drawn: DrawnSet, rows: Sequence[AugmentedImage], before: str) -> Card:
    lead = rows[0]
    verdict = drawn.verdicts.get(lead.id)
    decisive = sorted(verdict.comparisons, key=lambda c: c.answer != "different")[:1] if verdict else []
    return Card(
        session=drawn.session,
        epoch=drawn.epoch,
        pictures=tuple(_picture(drawn, row) for row in rows),
        prompt=lead.prompt,
        rewritten=bool(before) and lead.prompt != before,
        level=verdict.level if verdict else "none",
        inherited=verdict is not None and verdict.inherited_from is not None,
        caption_generated=decisive[0].caption_augmented if decisive else "",
        caption_original=decisive[0].caption_original if decisive else "",
    )


def _picture(drawn: DrawnSet, row: AugmentedImage) -> Picture:
    alt = f"Generated {_class_name(row)}, session {drawn.session}, epoch {drawn.epoch}: {row.prompt}"
    return Picture(uri=embedded(drawn.images / row.path), alt=alt)


def embedded(path: Path) -> str:
    """A PNG as a data URI, as it is if small, else scaled down to ``SIDE`` pixels and packed as WebP."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        if max(image.size) <= SIDE:
            return _uri(data, "image/png")
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "WEBP", quality=82)
    return _uri(out.getvalue(), "image/webp")


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
