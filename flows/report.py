"""Records to tables, curves and the gallery page; nothing here computes a result anew.

``build`` reads every run below a results folder, finished or not, and writes

    table.md  table.csv     a row for each dataset and method: mean and standard deviation over seeds
    curves.png  curves.svg  accuracy after each session; base against novel classes
    gallery.html            both, and prompts and images epoch by epoch (the paper's Figure 4)

Accuracies are printed in percent. ``base``, ``novel`` and ``harmonic`` are those after the last session:
without novel accuracy the comparison says nothing. Spread is the sample standard deviation over seeds; a
difference of two methods is taken seed by seed, with its standard error.
"""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tasks.records import EpochRecord, ExperimentRecord, Frozen, SessionRecord, StageRecord
from tasks.store import Store, write_atomic
from tasks.tracked import STAGES

METHODS = (
    "vlm_zero_shot", "finetune", "ncm", "ncm_tuned", "teen", "cec", "l2p", "dualprompt", "nc_fscil", "warp",
    "privilege", "gpt4o_images", "fixed_sd", "sd_vlm", "random", "first", "vlm", "guided", "ncm_guided",
    "ncm_tuned_guided", "teen_guided", "cec_guided", "l2p_guided", "dualprompt_guided", "nc_fscil_guided",
    "warp_guided", "privilege_guided",
)  # fmt: skip
"""The order of rows: what draws no images, what draws them without looking, the paper's own parts, and other
learners with them."""

OURS, WITHOUT_IMAGES = "guided", "finetune"

Model = TypeVar("Model", bound=BaseModel)


class Run(Frozen):
    """One run as its folder shows it. ``record`` is None while it is unfinished."""

    dataset: str
    method: str
    seed: int
    folder: Path
    record: ExperimentRecord | None
    sessions: tuple[SessionRecord, ...]
    cost: "Cost"


class Cost(Frozen):
    """What computing a run took; None where the state no longer knows it of every stage.

    Attributes:
        seconds: The sum over its stages, each as measured when it was first computed. So a kill, a resume or a
            stage shared with another run changes nothing.
        mib: The most memory that the process held in any stage, in MiB; on a GPU, that torch held there.
    """

    seconds: float | None
    mib: float | None


class Statistic(Frozen):
    """Mean and sample standard deviation of n values; None where one value has no spread."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Statistic | None":
        """Summarise values; None if there are none."""
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(mean=statistics.fmean(values), std=std, n=len(values))


class Column(Frozen):
    """One column: how it is called, what it is of a run, and whether it is printed in percent."""

    name: str
    value: Callable[[ExperimentRecord, Cost], float | None]
    percent: bool

    def text(self, statistic: Statistic | None) -> str:
        """A cell: ``66.7 ± 1.2`` in percent, a mean for counts (``123k`` from 100,000 on), a dash for nothing."""
        if statistic is None:
            return "–"
        if not self.percent:
            mean = statistic.mean
            return f"{mean:,.0f}" if mean < 99_999.5 else f"{mean / 1000:,.0f}k"
        spread = "" if statistic.std is None else f" ± {100 * statistic.std:.1f}"
        return f"{100 * statistic.mean:.1f}{spread}"


COLUMNS = (
    Column(name="A_base", value=lambda record, _: record.a_base, percent=True),
    Column(name="A_last", value=lambda record, _: record.a_last, percent=True),
    Column(name="A_avg", value=lambda record, _: record.a_avg, percent=True),
    Column(name="PD", value=lambda record, _: record.pd, percent=True),
    Column(name="base", value=lambda record, _: record.sessions[-1].base, percent=True),
    Column(name="novel", value=lambda record, _: record.sessions[-1].novel, percent=True),
    Column(name="harmonic", value=lambda record, _: record.sessions[-1].harmonic, percent=True),
    Column(name="images", value=lambda record, _: record.images_drawn, percent=False),
    Column(name="VLM calls", value=lambda record, _: record.usage.calls, percent=False),
    Column(name="VLM tokens", value=lambda record, _: record.usage.tokens, percent=False),
    Column(name="unparsed", value=lambda record, _: record.unparsed, percent=False),
    Column(name="epochs", value=lambda record, _: record.epochs, percent=False),
    Column(name="seconds", value=lambda _, cost: cost.seconds, percent=False),
    Column(name="MiB", value=lambda _, cost: cost.mib, percent=False),
)


class Row(Frozen):
    """One method on one dataset. ``cells`` follow ``COLUMNS``."""

    dataset: str
    method: str
    seeds: int
    unfinished: int
    cells: tuple[Statistic | None, ...]

    @property
    def seeds_text(self) -> str:
        """``5``, or ``4 (+1 unfinished)``."""
        return f"{self.seeds} (+{self.unfinished} unfinished)" if self.unfinished else str(self.seeds)

    @property
    def texts(self) -> tuple[str, ...]:
        """All cells as printed."""
        printed = (column.text(cell) for column, cell in zip(COLUMNS, self.cells, strict=True))
        return (self.dataset, self.method, self.seeds_text, *printed)


HEADINGS = ("dataset", "method", "seeds", *(column.name for column in COLUMNS))


# ------------------------------------------------------------------------------------------ reading


def collect(runs: Path, state: Path) -> list[Run]:
    """Read all runs below a results folder, in the tables' order.

    Args:
        runs: results folder, ``<dataset>/<method>/seed-<n>`` below it.
        state: state folder, which knows how long each stage took.

    Raises:
        ValueError: there is no run, or a record cannot be read; the message names it.
    """
    folders = [path for path in runs.glob("*/*/seed-*") if (path / "config.json").is_file()]
    if not folders:
        raise ValueError(f"{runs} holds no run; start one with: fscil dataset=digits method=guided seed=0")
    return sorted((_read_run(runs, folder, state) for folder in folders), key=_place)


def _read_run(runs: Path, folder: Path, state: Path) -> Run:
    dataset, method, seed = folder.relative_to(runs).parts
    whole = folder / "experiment.json"
    return Run(
        dataset=dataset,
        method=method,
        seed=int(seed.removeprefix("seed-")),
        folder=folder,
        record=_read(whole, ExperimentRecord) if whole.is_file() else None,
        sessions=tuple(_read(path, SessionRecord) for path in sorted(folder.glob("session-*/record.json"))),
        cost=cost(folder, Store(state)),
    )


def cost(folder: Path, store: Store) -> Cost:
    """What the stages of a run folder took, as far as they are sealed."""
    sessions = [_read(path, SessionRecord) for path in folder.glob("session-*/record.json")]
    epochs = [_read(path, EpochRecord) for path in folder.glob("session-*/epoch-*/record.json")]
    sealed: list[StageRecord | None] = [
        record for session in sessions for record in (session.initial, session.test)
    ]
    sealed += [getattr(epoch, stage) for epoch in epochs for stage in STAGES]
    timings = [store.timing(record) for record in sealed if record is not None]
    if not timings or None in timings:
        return Cost(seconds=None, mib=None)
    known = [timing for timing in timings if timing is not None]
    held = [timing.gpu_peak_mib or timing.peak_mib for timing in known]
    most = None if None in held else max(mib for mib in held if mib is not None)
    return Cost(seconds=sum(timing.seconds for timing in known), mib=most)


def _read(path: Path, kind: type[Model]) -> Model:
    try:
        return kind.model_validate_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not a {kind.__name__} of this version; move its run folder away and run it again"
        ) from error


def _place(run: Run) -> tuple[str, int, str, int]:
    return (run.dataset, *_rank(run.method), run.seed)


def _rank(method: str) -> tuple[int, str]:
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


# ------------------------------------------------------------------------------------------ table


def table(runs: Iterable[Run]) -> list[Row]:
    """One row for each dataset and method, in the order of the runs."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.dataset, run.method), []).append(run)
    return [_row(dataset, method, members) for (dataset, method), members in groups.items()]


def _row(dataset: str, method: str, runs: list[Run]) -> Row:
    finished = [(run.record, run.cost) for run in runs if run.record is not None]
    cells = []
    for column in COLUMNS:
        values = [column.value(record, took) for record, took in finished]
        cells.append(Statistic.of([value for value in values if value is not None]))
    unfinished = len(runs) - len(finished)
    return Row(dataset=dataset, method=method, seeds=len(finished), unfinished=unfinished, cells=tuple(cells))


def difference(
    runs: Iterable[Run], better: str, worse: str, dataset: str, column: Column
) -> Statistic | None:
    """Difference of two methods over the seeds that both finished, seed by seed.

    Returns:
        Mean, sample standard deviation and number of the differences (not in percent); None without a
        common seed. The standard error of the mean is ``std / sqrt(n)``.
    """
    values: dict[str, dict[int, float]] = {better: {}, worse: {}}
    for run in runs:
        if run.dataset == dataset and run.method in values and run.record is not None:
            value = column.value(run.record, run.cost)
            if value is not None:
                values[run.method][run.seed] = value
    common = sorted(values[better].keys() & values[worse].keys())
    return Statistic.of([values[better][seed] - values[worse][seed] for seed in common])


def comparisons(runs: Sequence[Run]) -> list[str]:
    """Plain sentences: ours against every other method, and every other against no generated images."""
    sentences = []
    for dataset in dict.fromkeys(run.dataset for run in runs):
        present = list(dict.fromkeys(run.method for run in runs if run.dataset == dataset))
        pairs = [(OURS, other) for other in reversed(present) if other != OURS]
        pairs += [(other, WITHOUT_IMAGES) for other in present if other not in (OURS, WITHOUT_IMAGES)]
        sentences += [text for pair in pairs if (text := _sentence(runs, dataset, *pair))]
    return sentences


def _sentence(runs: Sequence[Run], dataset: str, better: str, worse: str) -> str | None:
    parts, n = [], 0
    for column in COLUMNS:
        if column.name not in ("A_last", "novel"):
            continue
        found = difference(runs, better, worse, dataset, column)
        if found is not None:
            n = found.n
            error = "" if found.std is None else f" ± {100 * found.std / math.sqrt(n):.1f}"
            parts.append(f"{column.name} {100 * found.mean:+.1f}{error}")
    if not parts:
        return None
    seeds = "1 seed, so no standard error" if n == 1 else f"mean ± standard error over {n} seeds"
    return f"{dataset}: {better} - {worse}: {', '.join(parts)} percentage points ({seeds})"


# ------------------------------------------------------------------------------------------ writing


def markdown(rows: Sequence[Row], sentences: Sequence[str]) -> str:
    """The table and the sentences below it, as Markdown."""
    lines = [HEADINGS, ["---"] * 3 + ["---:"] * len(COLUMNS), *(row.texts for row in rows)]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return text + "\n\n" + NOTE + "\n" + "".join(f"\n- {sentence}" for sentence in sentences) + "\n"


NOTE = (
    "Accuracies in percent, mean ± standard deviation over seeds. A_base, A_last: after the first and last "
    "session, over all classes seen; A_avg: mean over sessions; PD = A_base - A_last; base, novel, harmonic: "
    "after the last session. Images, VLM calls, tokens (read and written), unparsed answers (no verdict, or no "
    "class, which counts as wrong), epochs, seconds of computing and MiB (memory held at most) are means per run."
)


def comma_separated(rows: Sequence[Row]) -> str:
    """The table as CSV: mean and standard deviation in columns of their own, accuracies in percent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = [name for column in COLUMNS for name in (column.name, f"{column.name} std")]
    writer.writerow(["dataset", "method", "seeds", "unfinished", *heads])
    for row in rows:
        cells: list[str] = []
        for column, cell in zip(COLUMNS, row.cells, strict=True):
            scale = 100 if column.percent else 1
            cells += ["", ""] if cell is None else [_number(cell.mean, scale), _number(cell.std, scale)]
        writer.writerow([row.dataset, row.method, row.seeds, row.unfinished, *cells])
    return text.getvalue()


def _number(value: float | None, scale: int) -> str:
    return "" if value is None else f"{scale * value:.4f}".rstrip("0").rstrip(".")


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
    found = sorted((_read_run(runs, runs / record.run, state) for record in records), key=_place)
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
    left_out = ("dataset", "PD", "base", "unparsed", "epochs", "MiB")
    kept = [place for place, name in enumerate(HEADINGS) if name not in left_out]
    shown = Table(title=escape(dataset), box=SIMPLE_HEAD, padding=0, show_edge=False)
    for place in kept:
        side: Literal["left", "right"] = "left" if place == 1 else "right"
        heading = HEADINGS[place].replace(" ", "\n")
        shown.add_column(heading, justify=side, no_wrap=place == 1, overflow="fold")
    for row in rows:
        shown.add_row(*(escape(row.texts[place]) for place in kept))
    return shown


def build(runs: Path, out: Path, state: Path) -> list[Path]:
    """Write the tables, the curves and the gallery page.

    Args:
        runs: results folder.
        out: where to write; made if need be.
        state: state folder.

    Returns:
        The files written.

    Raises:
        ValueError: there is no run, or a record cannot be read.
    """
    from flows.curves import charts, draw
    from flows.gallery import page

    found = collect(runs, state)
    rows, sentences, drawn = table(found), comparisons(found), charts(found)
    files: dict[str, str | bytes] = {
        "table.md": markdown(rows, sentences),
        "table.csv": comma_separated(rows),
        "curves.png": draw(found, "png"),
        "curves.svg": drawn["wide_light"],
        "gallery.html": page(found, rows, sentences, drawn),
    }
    for name, content in files.items():
        write_atomic(out / name, content)
    return [out / name for name in files]
