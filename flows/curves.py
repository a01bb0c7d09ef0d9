"""Accuracy after each session: one panel over all classes, one with base against novel."""

import io
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tasks.records import SessionAccuracy

if TYPE_CHECKING:
    from flows.results import Run

Measure = Callable[[SessionAccuracy], float | None]
Point = tuple[int, float, float]

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f", "#a6761d")
"""Told apart by colour-blind eyes too (Okabe and Ito, then three more); the tenth method starts over."""


def draw(runs: "Sequence[Run]", kind: Literal["png", "svg"]) -> bytes:
    """Draw all finished and unfinished sessions; the same runs give the same bytes.

    Args:
        runs: runs in the table's order.
        kind: file format.
    """
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    with rc_context(style()):
        figure = Figure(figsize=(9.6, 3.6 * len(datasets)), layout="constrained")
        panels = figure.subplots(len(datasets), 2, squeeze=False).flatten().tolist()
        for dataset, overall, split in zip(datasets, panels[::2], panels[1::2], strict=True):
            _dataset(overall, split, [run for run in runs if run.dataset == dataset])
            overall.set_title(f"{dataset}: all classes seen")
            split.set_title(f"{dataset}: base (solid), novel (dashed)")
        return written(figure, kind)


def written(figure: Figure, kind: Literal["png", "svg"]) -> bytes:
    """A figure as a file without a date, so that the same figure is the same bytes; call it within its style."""
    out = io.BytesIO()
    plain = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
    figure.savefig(out, format=kind, dpi=160, metadata=plain, transparent=kind == "svg")
    return out.getvalue()


def style(ink: str = "#222222") -> dict[Any, Any]:
    """Settings that all plots share; ``ink`` is the colour of text and axes."""
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(names, ink),
        "svg.hashsalt": "fscil",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "axes.grid": True,
        "grid.alpha": 0.2,
    }


def _dataset(overall: Axes, split: Axes, runs: "list[Run]") -> None:
    methods = list(dict.fromkeys(run.method for run in runs))
    for place, method in enumerate(methods):
        members = [run for run in runs if run.method == method]
        colour = COLOURS[place % len(COLOURS)]
        _line(overall, points(members, lambda s: s.overall), colour, "-", method)
        _line(split, points(members, lambda s: s.base), colour, "-", None)
        _line(split, points(members, lambda s: s.novel), colour, "--", None)
    last = max((session.session for run in runs for session in run.sessions), default=0)
    for axes in (overall, split):
        axes.set_xlabel("session")
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(0, 100)
        axes.set_xlim(-0.1, last + 0.1)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    if overall.get_legend_handles_labels()[0]:
        split.legend(
            *overall.get_legend_handles_labels(),
            loc="upper left",
            bbox_to_anchor=(1, 1),
            fontsize="x-small",
            ncols=1 + len(methods) // 18,
        )


def points(runs: "Sequence[Run]", measure: Measure) -> list[Point]:
    """Session, mean and sample standard deviation over seeds, in percent; only sessions that have a value."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for session in run.sessions:
            if (value := measure(session.test.output.accuracy)) is not None:
                values.setdefault(session.session, []).append(100 * value)
    return [
        (session, statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0)
        for session, found in sorted(values.items())
    ]


def _line(axes: Axes, line: list[Point], colour: str, dashes: str, label: str | None) -> None:
    if not line:
        return
    sessions, means, spreads = zip(*line, strict=True)
    axes.plot(sessions, means, dashes, color=colour, marker="o", markersize=4, label=label)
    if any(spreads):
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(sessions, low, high, color=colour, alpha=0.15, linewidth=0)
