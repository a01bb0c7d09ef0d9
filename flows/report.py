"""Records to tables, plot data and the report page; nothing here computes a result anew.

``build`` reads every run below a results folder, finished or not, and writes

    table.md  table.csv  table.tex   the rows of the paper's Tables 1, 3 and 4, with budgets and published values
    sessions.csv  metrics.json       what ``dvc plots`` and ``dvc metrics`` show
    curves.png  curves.svg           accuracy after each session; base against novel classes
    report.html                      all of it, and prompts and images epoch by epoch (the paper's Figure 4)
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.formats import comma_separated, latex, markdown, metrics_json, sessions_csv
from flows.results import Run, collect, in_order, read_run
from flows.tables import HEADINGS, Row, comparisons, table
from tasks.records import ExperimentRecord
from tasks.store import write_atomic


def build(runs: Path, out: Path, state: Path) -> list[Path]:
    """Write the tables, the plot data, the curves and the page.

    Args:
        runs: results folder.
        out: where to write; made if need be.
        state: state folder.

    Returns:
        The files written.

    Raises:
        ValueError: there is no run, or a record cannot be read.
    """
    from flows.curves import draw
    from flows.report_page import page

    found = collect(runs, state)
    rows, sentences = table(found), comparisons(found)
    files: dict[str, str | bytes] = {
        "table.md": markdown(rows, sentences),
        "table.csv": comma_separated(rows),
        "table.tex": latex(rows),
        "sessions.csv": sessions_csv(found),
        "metrics.json": metrics_json(rows),
        "curves.png": draw(found, "png"),
        "curves.svg": draw(found, "svg"),
        "report.html": page(found, rows, sentences),
    }
    for name, content in files.items():
        write_atomic(out / name, content)
    return [out / name for name in files]


# ------------------------------------------------------------------------------------------ the terminal


def print_table(
    records: Sequence[ExperimentRecord], runs: Path, state: Path, console: Console | None = None
) -> None:
    """Print finished runs as a table for the terminal, and the differences below it.

    Args:
        records: the runs to print.
        runs: results folder, which they are in.
        state: state folder, which knows how long each stage took.
        console: where to print; standard output by default.
    """
    found = in_order(read_run(runs, runs / record.run, state) for record in records)
    console = console or Console()
    for dataset in dict.fromkeys(run.dataset for run in found):
        console.print(_terminal_table(dataset, table(run for run in found if run.dataset == dataset)))
    for sentence in [*comparisons(found), *_unparsed(found)]:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def _unparsed(runs: Iterable[Run]) -> Iterator[str]:
    """A sentence for each method some of whose answers could not be read; the terminal has no column for it."""
    place = HEADINGS.index("unparsed")
    for row in table(runs):
        if (text := row.texts[place]) not in ("0", "–"):
            yield f"{row.dataset}: {row.method}: {text} VLM answers a run named no verdict or no class (unparsed)"


def _terminal_table(dataset: str, rows: Sequence[Row]) -> Table:
    """A table of eighty characters with one seed; the columns that do not fit are in the files."""
    left_out = ("dataset", "PD", "base", "cost", "unparsed", "epochs", "MiB")
    kept = [place for place, name in enumerate(HEADINGS) if name not in left_out]
    shown = Table(title=escape(dataset), box=SIMPLE_HEAD, padding=0, show_edge=False)
    for place in kept:
        side: Literal["left", "right"] = "left" if place == 1 else "right"
        heading = HEADINGS[place].replace(" ", "\n")
        shown.add_column(heading, justify=side, no_wrap=place == 1, overflow="fold")
    for row in rows:
        shown.add_row(*(escape(row.texts[place]) for place in kept))
    return shown
