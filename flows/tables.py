"""Runs to rows: mean and standard deviation over seeds, who is best, and differences taken seed by seed.

``base``, ``novel`` and ``harmonic`` are those after the last session: without novel accuracy the comparison says
nothing. Spread is the sample standard deviation over seeds; a difference of two methods comes with its standard
error.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from flows.results import OURS, WITHOUT_IMAGES, Cost, Run
from tasks.records import ExperimentRecord, Frozen, Usage

Mark = Literal["best", "second"]


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

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None where there is no spread."""
        return None if self.std is None else self.std / math.sqrt(self.n)


class Column(Frozen):
    """One column: how it is called, what it is of a run, and how it is printed."""

    name: str
    value: Callable[[ExperimentRecord, Cost], float | None]
    percent: bool = False
    decimals: int = 0

    def text(self, statistic: Statistic | None) -> str:
        """A cell: ``66.7 ± 1.2`` in percent, a mean for counts (``123k`` from 100,000 on), a dash for nothing."""
        if statistic is None:
            return "–"
        if not self.percent:
            mean = statistic.mean
            return f"{mean:,.{self.decimals}f}" if mean < 99_999.5 else f"{mean / 1000:,.0f}k"
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
    Column(name="images", value=lambda record, _: record.images_drawn),
    Column(name="VLM calls", value=lambda record, _: record.usage.calls),
    Column(name="VLM tokens", value=lambda record, _: record.usage.tokens),
    Column(name="cost", value=lambda record, _: Usage.total((record.usage, record.drawing)).cost, decimals=2),
    Column(name="unparsed", value=lambda record, _: record.unparsed),
    Column(name="epochs", value=lambda record, _: record.epochs),
    Column(name="seconds", value=lambda _, cost: cost.seconds),
    Column(name="MiB", value=lambda _, cost: cost.mib),
)
COLUMN = {column.name: column for column in COLUMNS}
HEADINGS = ("dataset", "method", "seeds", *COLUMN)
RANKED = ("A_base", "A_last", "A_avg", "base", "novel", "harmonic")
"""Columns in which the best and the second best are marked; more is better in each."""


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
        """All cells as printed, below ``HEADINGS``."""
        printed = (column.text(cell) for column, cell in zip(COLUMNS, self.cells, strict=True))
        return (self.dataset, self.method, self.seeds_text, *printed)

    def cell(self, column: str) -> Statistic | None:
        """The cell of a column, by its name."""
        return self.cells[list(COLUMN).index(column)]


def table(runs: Iterable[Run]) -> list[Row]:
    """One row for each dataset and method, in the order of the runs."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.dataset, run.method), []).append(run)
    return [_row(dataset, method, members) for (dataset, method), members in groups.items()]


def _row(dataset: str, method: str, runs: list[Run]) -> Row:
    finished = [run for run in runs if run.record is not None]
    cells = tuple(Statistic.of([*by_seed(finished, column).values()]) for column in COLUMNS)
    unfinished = len(runs) - len(finished)
    return Row(dataset=dataset, method=method, seeds=len(finished), unfinished=unfinished, cells=cells)


def by_seed(runs: Iterable[Run], column: Column) -> dict[int, float]:
    """A column's value for each finished run of one dataset and method, where it has one; not in percent."""
    return {
        run.seed: value
        for run in runs
        if run.record is not None and (value := column.value(run.record, run.cost)) is not None
    }


# ------------------------------------------------------------------------------------------ best and second


ZERO_SHOT = "vlm_zero_shot"


def marks(rows: Iterable[Row]) -> dict[tuple[str, str, str], Mark]:
    """Which cells are best and second best of their dataset, by dataset, method and column of ``RANKED``.

    Cells that print the same mean share their mark. A column with one cell has none. A VLM that classifies by itself
    learned elsewhere, from nobody knows how many images: it stands in the table and is not ranked.
    """
    found: dict[tuple[str, str, str], Mark] = {}
    listed = [row for row in rows if row.method != ZERO_SHOT]
    for dataset in dict.fromkeys(row.dataset for row in listed):
        members = [row for row in listed if row.dataset == dataset]
        for column in RANKED:
            means = {row.method: COLUMN[column].text(cell) for row in members if (cell := row.cell(column))}
            values = {method: float(text.split(" ")[0]) for method, text in means.items()}
            levels = sorted(set(values.values()), reverse=True)[:2] if len(values) > 1 else []
            for method, value in values.items():
                if value in levels:
                    found[dataset, method, column] = "best" if value == levels[0] else "second"
    return found


# ------------------------------------------------------------------------------------------ the paper's tables

COMPARED = (
    "finetune", "ncm", "ncm_tuned", "teen", "cec", "l2p", "dualprompt", "nc_fscil", "warp", "privilege", "guided",
)  # fmt: skip
ABLATION = (ZERO_SHOT, "finetune", "fixed_sd", "random", "first", "sd_vlm", "vlm", "guided")


class Section(Frozen):
    """One of the paper's tables, for one dataset: its rows, in order. No two sections of a dataset say the same."""

    dataset: str
    title: str
    rows: tuple[Row, ...]


def sections(rows: Iterable[Row]) -> list[Section]:
    """Sort rows into the paper's tables. A row may stand in two; a section whose rows all stand in another goes."""
    listed, found = list(rows), []
    for dataset in dict.fromkeys(row.dataset for row in listed):
        parts = _parts([row for row in listed if row.dataset == dataset])
        kept = [(title, part) for title, part in parts if not _told(part, [other for _, other in parts])]
        found += [Section(dataset=dataset, title=title, rows=tuple(part)) for title, part in kept]
    return found


def _parts(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    place = {method: n for n, method in enumerate(ABLATION)}
    guided = [row for row in rows if row.method.endswith("_guided")]
    ablation = sorted((row for row in rows if row.method in ABLATION), key=lambda row: place[row.method])
    rest = [row for row in rows if row.method not in (*COMPARED, *ABLATION) and row not in guided]
    return [
        ("Compared methods (the paper's Table 1)", [row for row in rows if row.method in COMPARED]),
        ("Ablation (the paper's Tables 3 and 4)", ablation),
        ("Compared methods with guided's images", guided),
        ("Other methods", rest),
    ]


def _told(part: list[Row], parts: list[list[Row]]) -> bool:
    """Whether a section's rows all stand in a larger one, or in an equal one before it."""
    methods, before = {row.method for row in part}, True
    for other in parts:
        if other is part:
            before = False
            continue
        others = {row.method for row in other}
        if methods < others or (before and methods == others):
            return True
    return not methods


# ------------------------------------------------------------------------------------------ differences


def difference(
    runs: Iterable[Run], better: str, worse: str, dataset: str, column: Column
) -> Statistic | None:
    """Difference of two methods over the seeds that both finished, seed by seed.

    Returns:
        Mean, sample standard deviation and number of the differences (not in percent); None without a
        common seed.
    """
    listed = [run for run in runs if run.dataset == dataset]
    more = by_seed((run for run in listed if run.method == better), column)
    less = by_seed((run for run in listed if run.method == worse), column)
    return Statistic.of([more[seed] - less[seed] for seed in sorted(more.keys() & less.keys())])


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
    for name in ("A_last", "novel"):
        found = difference(runs, better, worse, dataset, COLUMN[name])
        if found is not None:
            n = found.n
            error = "" if found.error is None else f" ± {100 * found.error:.1f}"
            parts.append(f"{name} {100 * found.mean:+.1f}{error}")
    if not parts:
        return None
    seeds = "1 seed, so no standard error" if n == 1 else f"mean ± standard error over {n} seeds"
    return f"{dataset}: {better} - {worse}: {', '.join(parts)} percentage points ({seeds})"
