"""The report page: tables, charts, prompts and pictures in one HTML file that needs nothing beside it.

Text from records (datasets, methods, class names, prompts, captions) is escaped; pictures are embedded; the one
script is ours, is allowed by its digest alone, and adds tabs, a choice of methods and the comparison of two. A
reader without scripts sees everything else, one below the other.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from flows.charts import (
    Look,
    Panel,
    balance_panel,
    budget_panels,
    looks,
    methods_of,
    numbered,
    session_panels,
    tuning_panels,
)
from flows.formats import METRICS, NOTE, Marks, beside, columns_of
from flows.gallery import ShownClass, shown_classes
from flows.published import published, published_label
from flows.results import OURS, WITHOUT_IMAGES, Run, rank
from flows.tables import ABLATION, COLUMN, COMPARED, Column, Mark, Row, by_seed, marks, sections
from tasks.records import Frozen

FOLDER = Path(__file__).parent
SHOWN_AT_FIRST = 8  # methods in the charts; the others are one click away
SIGNS = {"o": "●○", "s": "■□", "^": "▲△", "D": "◆◇"}


class Cell(Frozen):
    """A cell of a table: its text, whether it is best or second, and the published value beside it."""

    text: str
    mark: Mark | None
    paper: str


class Line(Frozen):
    """A row of a table."""

    method: str
    label: str
    seeds: str
    cells: tuple[Cell, ...]


class Table(Frozen):
    """One of the paper's tables for one dataset."""

    title: str
    lines: tuple[Line, ...]


class Chip(Frozen):
    """A method in the legend, which is also where it is chosen. ``groups``: the buttons that choose it."""

    look: Look
    sign: str
    shown: bool
    groups: str


class DatasetPart(Frozen):
    """What the page shows of one dataset."""

    name: str
    tables: tuple[Table, ...]
    accuracy: tuple[Panel, ...]
    tuning: tuple[Panel, ...]
    budgets: tuple[Panel, ...]
    classes: tuple[ShownClass, ...]
    sentences: tuple[str, ...]


def page(runs: Sequence[Run], rows: Sequence[Row], sentences: Sequence[str]) -> str:
    """Render the page.

    Args:
        runs: runs in the table's order.
        rows: the table.
        sentences: comparisons, in words; each begins with its dataset.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = lambda panel: Markup(panel.svg)
    script = (FOLDER / "report.js").read_text("utf-8")
    parts = _parts(runs, rows, sentences)
    return environment.get_template("report.html.jinja").render(
        style=Markup((FOLDER / "report.css").read_text("utf-8")),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        counts={"runs": len(runs), "methods": len(methods_of(runs)), "datasets": len(parts)},
        unfinished=sum(run.record is None for run in runs),
        columns=columns_of(rows),
        parts=parts,
        chips=chips(runs, rows),
        note=NOTE,
        source=published().source,
        seeds=values_by_seed(runs),
        measures=METRICS,
        ours=OURS,
        baseline=WITHOUT_IMAGES,
    )


def page_looks(runs: Sequence[Run]) -> dict[str, Look]:
    """How each method is drawn, in the tables' order whichever datasets it ran on."""
    return looks(sorted(methods_of(runs), key=rank))


def _parts(runs: Sequence[Run], rows: Sequence[Row], sentences: Sequence[str]) -> list[DatasetPart]:
    found, classes = page_looks(runs), shown_classes(runs)
    parts = []
    for dataset in dict.fromkeys(run.dataset for run in runs):
        members = [run for run in runs if run.dataset == dataset]
        own = [row for row in rows if row.dataset == dataset]
        balance = balance_panel(own, found)
        part = DatasetPart(
            name=dataset,
            tables=tuple(tables_of(own)),
            accuracy=(*session_panels(members, found), *([balance] if balance else [])),
            tuning=tuple(tuning_panels(members, found)),
            budgets=tuple(budget_panels(own, found)),
            classes=tuple(shown for shown in classes if shown.dataset == dataset),
            sentences=tuple(sentence for sentence in sentences if sentence.startswith(f"{dataset}: ")),
        )
        parts.append(part)
    return _with_own_ids(parts)


def _with_own_ids(parts: Sequence[DatasetPart]) -> list[DatasetPart]:
    """Panels whose ids are unique on the page."""
    kinds = ("accuracy", "tuning", "budgets")
    panels = numbered([panel for part in parts for kind in kinds for panel in getattr(part, kind)])
    return [
        part.model_copy(update={kind: tuple(next(panels) for _ in getattr(part, kind)) for kind in kinds})
        for part in parts
    ]


# ------------------------------------------------------------------------------------------ tables


def tables_of(rows: Sequence[Row]) -> list[Table]:
    """The tables of one dataset, with the best and second best marked."""
    found, columns = marks(rows), columns_of(rows)
    return [
        Table(title=section.title, lines=tuple(_line(row, columns, found) for row in section.rows))
        for section in sections(rows)
    ]


def _line(row: Row, columns: Sequence[Column], found: Marks) -> Line:
    cells = tuple(
        Cell(
            text=column.text(row.cell(column.name)),
            mark=found.get((row.dataset, row.method, column.name)),
            paper=beside(row, column),
        )
        for column in columns
    )
    return Line(method=row.method, label=published_label(row.method) or "", seeds=row.seeds_text, cells=cells)


# ------------------------------------------------------------------------------------------ choices


def chips(runs: Sequence[Run], rows: Sequence[Row]) -> list[Chip]:
    """The legend: every method with its look; few are drawn at first where there are many."""
    found = page_looks(runs)
    shown = first_shown(rows)
    return [
        Chip(
            look=look,
            sign=SIGNS[look.marker][look.dashed],
            shown=method in shown,
            groups=" ".join(_groups(method)),
        )
        for method, look in found.items()
    ]


def first_shown(rows: Sequence[Row]) -> set[str]:
    """Ours, the baseline, and those that are best after the last session, up to ``SHOWN_AT_FIRST``."""
    best: dict[str, float] = {}
    for row in rows:
        cell = row.cell("A_last")
        best[row.method] = max(best.get(row.method, 0.0), cell.mean if cell else 0.0)
    order = sorted(best, key=lambda method: (method not in (OURS, WITHOUT_IMAGES), -best[method], method))
    return set(order[:SHOWN_AT_FIRST])


def _groups(method: str) -> list[str]:
    named = {
        "compared": method in COMPARED,
        "ablation": method in ABLATION,
        "guided": method.endswith("guided"),
    }
    return [name for name, within in named.items() if within]


def values_by_seed(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, dict[int, float]]]]:
    """Dataset -> method -> measure -> seed -> percent: what the comparison of two methods is made from."""
    found: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    for dataset, method in dict.fromkeys((run.dataset, run.method) for run in runs if run.record):
        members = [run for run in runs if (run.dataset, run.method) == (dataset, method)]
        found.setdefault(dataset, {})[method] = {
            name: {seed: round(100 * value, 4) for seed, value in by_seed(members, COLUMN[name]).items()}
            for name in METRICS
        }
    return found
