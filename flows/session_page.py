"""A session's page in Prefect, as Markdown: test accuracy, its epochs, what they drew, and where the rest is.

Pictures are data URIs, since a page may not read files: at most ``ROOM`` bytes of them in all, for the server keeps
them in its database. Every text that a VLM or a folder's name brought is escaped.
"""

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path

from tasks.records import (
    AugmentationSet,
    AugmentedImage,
    EpochRecord,
    SessionAccuracy,
    SessionRecord,
    Verdict,
)
from tasks.store import read_lines
from tasks.text import one_line
from tasks.tracked import by_class, class_of, contact_sheet
from tasks.tracking_runs import TrackingSettings

ROOM = 96_000
SHEETS, TILES = 8, 24  # sheets of a page; pictures of a sheet
SIDES = (64, 48, 32, 24)  # of a tile, in pixels; the first with which a sheet fits
PROMPTS, PROMPT_LENGTH = 3, 200  # of an epoch; in characters

_LEGEND = (
    "Validation and generated: images that the classifier reads rightly. Verdicts: semantic / detail / unread. "
    "Rewritten: prompts. Drawn: images for the next epoch."
)
_MARK = re.compile(r"([!-/:-@\[-`{-~])")


def session_page(
    title: str, session: SessionRecord, epochs: Sequence[EpochRecord], folder: Path, places: Sequence[str]
) -> str:
    """The page of a sealed session.

    Args:
        title: its heading.
        session: its record.
        epochs: those of its epochs, in order.
        folder: the session's results, as exported.
        places: lines of Markdown that say where everything else is.
    """
    blocks = [f"## {escaped(title)}", _result(session)]
    if epochs:
        blocks.append(_epoch_table(epochs))
    if drawn := _sets(session, epochs, folder):
        blocks += ["### Drawn", *_sheets(drawn)]
    if prompts := _prompts(epochs, drawn, folder):
        blocks += ["### Prompts that the VLM rewrote", "\n".join(prompts)]
    blocks += ["### Where the rest is", "\n".join(f"- {place}" for place in places)]
    return "\n\n".join(blocks)


def mlflow_place(tracking: TrackingSettings, run: str, page: str | None) -> str:
    """Where a session is in MLflow, as a line of Markdown; ``page`` is its address there, where it is there."""
    if not tracking.enabled:
        return "MLflow: off for this run (`tracking=off`)"
    if page is None:
        return f"MLflow: nothing was written; `fscil track {run}` does"
    opened = "" if tracking.address == tracking.uri.rstrip("/") else " (where `make ui` or `make up` runs)"
    return f"MLflow: [{run}]({page}){opened}"


def escaped(text: str) -> str:
    """Text of others as one line that Markdown shows as it is: no mark-up, no link, no HTML."""
    return _MARK.sub(r"\\\1", one_line(text))


def artifact_key(*parts: str) -> str:
    """A key as Prefect takes them: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


# ------------------------------------------------------------------------------------------ numbers


def _result(session: SessionRecord) -> str:
    accuracy = session.test.output.accuracy
    novel = "" if accuracy.novel is None else f", base {accuracy.base:.1%}, novel {accuracy.novel:.1%}"
    why = escaped(session.converged_because)
    return f"**Test accuracy {accuracy.overall:.1%}**{novel}, after {session.epochs} epochs ({why})."


def _epoch_table(epochs: Sequence[EpochRecord]) -> str:
    head = ("epoch", "validation", "generated", "failures", "verdicts", "rewritten", "drawn")
    rows = [_row(record) for record in epochs]
    lines = [head, ["---:"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{_LEGEND}"


def _row(record: EpochRecord) -> list[str]:
    out = record.evaluate.output
    mined = str(sum(record.mine.output.failures.values())) if record.mine else ""
    verdicts = changed = ""
    if record.compare:
        said = record.compare.output
        verdicts, changed = f"{said.semantic} / {said.detail} / {said.unparsed}", str(said.rewritten)
    drawn = str(record.regenerate.output.count) if record.regenerate else ""
    counted = [_counted(out.validation), _counted(out.augmented)]
    return [str(record.epoch), *counted, mined, verdicts, changed, drawn]


def _counted(accuracy: SessionAccuracy) -> str:
    total = sum(count.total for count in accuracy.counts)
    right = sum(count.correct for count in accuracy.counts)
    return f"{right}/{total} ({right / total:.0%})" if total else ""


# ------------------------------------------------------------------------------------------ pictures and prompts


def _sets(
    session: SessionRecord, epochs: Sequence[EpochRecord], folder: Path
) -> list[tuple[AugmentationSet, Path]]:
    """A_0, A_1, ... and the folder that each was exported to."""
    sealed = [(session.initial, folder / "initial")]
    sealed += [(record.regenerate, folder / f"epoch-{record.epoch:03d}") for record in epochs]
    return [(stage.output, place) for stage, place in sealed if stage is not None]


def _sheets(drawn: Sequence[tuple[AugmentationSet, Path]]) -> list[str]:
    """A picture of each set; of many sets the first, the last and some between."""
    steps = min(len(drawn), SHEETS)
    chosen = sorted({round(n * (len(drawn) - 1) / max(1, steps - 1)) for n in range(steps)})
    room = ROOM // len(chosen)
    lines = []
    for images, folder in (drawn[n] for n in chosen):
        if (address := _sheet(images, folder, room)) is not None:
            name = f"A_{images.epoch}"
            lines.append(f"`{name}`, {images.count} images\n\n![Contact sheet of {name}]({address})")
    return lines


def _sheet(images: AugmentationSet, folder: Path, room: int) -> str | None:
    """The first images of the classes as a data URI of at most ``room`` characters; None where none is that small."""
    classes = list(by_class(read_lines(folder / images.manifest.name, AugmentedImage)).values())
    if not classes:
        return None
    each = max(1, TILES // len(classes))
    classes = classes[:: -(-len(classes) // TILES)]
    paths = [folder / images.images.name / row.path for members in classes for row in members[:each]]
    for side in SIDES:
        buffer = io.BytesIO()
        contact_sheet(paths, side).save(buffer, format="WEBP", quality=75)
        address = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(address) <= room:
            return address
    return None


def _prompts(
    epochs: Sequence[EpochRecord], drawn: Sequence[tuple[AugmentationSet, Path]], folder: Path
) -> list[str]:
    """A few of each epoch's prompts that are not those of the set that the VLM saw."""
    places = {images.epoch: (images, place) for images, place in drawn}
    lines = []
    for record in epochs:
        if record.compare is None:
            continue
        images, place = places[record.epoch]
        rows = {row.id: row for row in read_lines(place / images.manifest.name, AugmentedImage)}
        name = record.compare.output.verdicts.name
        verdicts = read_lines(folder / f"epoch-{record.epoch:03d}" / name, Verdict)
        changed: dict[str, None] = {}
        for verdict in verdicts:
            seen = rows[verdict.augmented_id]
            if verdict.inherited_from is None and verdict.prompt_next != seen.prompt:
                changed[f"{escaped(class_of(seen))}: {escaped(verdict.prompt_next[:PROMPT_LENGTH])}"] = None
        lines += [f"- epoch {record.epoch}, {line}" for line in list(changed)[:PROMPTS]]
    return lines
