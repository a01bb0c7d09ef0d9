"""Panels of the report page: small SVGs whose colours are the page's, one group of shapes for each method.

matplotlib draws with stand-in colours, which become CSS variables afterwards, so that one SVG serves a light and a
dark page; each method's shapes carry ``data-method``, so that the page can hide them. Text stays text.
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from statistics import fmean, stdev

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flows.curves import Measure, points, style
from flows.results import OURS, Run
from flows.tables import COLUMN, Row
from tasks.records import Frozen

INK, LINE = "#010203", "#040506"
COLOURS = (
    "#0068a8",
    "#c24e00",
    "#007a59",
    "#b0397f",
    "#8a6a00",
    "#6a51c7",
    "#5b6570",
    "#a3262f",
    "#00808a",
    "#7a4a21",
)
"""Stand-ins for the page's ``--m0`` to ``--m9``; told apart, with the markers, by colour-blind eyes too."""
MARKERS = ("o", "s", "^", "D")
SIZE = (4.6, 3.3)  # inches; a panel is as wide as a phone
POINTS = 80  # of a line, at most: longer ones are averaged in equal parts
MARKED_POINTS = 30  # a line of more has no markers

Point = tuple[float, float, float]
"""Where on the x axis, mean over seeds, sample standard deviation (0 with one seed)."""


class Look(Frozen):
    """How a method is drawn everywhere on the page.

    Attributes:
        index: what the shapes' ``data-method`` says; unique on the page.
        colour: place in ``COLOURS``.
        marker: matplotlib's name of the shape.
        dashed: whether its lines are: a learner with guided's images, whose own line is solid.
    """

    index: int
    method: str
    colour: int
    marker: str
    dashed: bool


class Panel(Frozen):
    """One chart. ``alt`` says in words what it shows; ``svg`` is markup of ours."""

    title: str
    alt: str
    svg: str


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """Give each method its look: ours first, and one with guided's images the colour of the learner by itself."""
    plain = [method for method in methods if not method.endswith("_guided")]
    plain.sort(key=lambda method: method != OURS)
    plain += [m for m in (method.removesuffix("_guided") for method in methods) if m not in plain]
    found = {}
    for index, method in enumerate(methods):
        place = plain.index(method if method in plain else method.removesuffix("_guided"))
        found[method] = Look(
            index=index,
            method=method,
            colour=place % len(COLOURS),
            marker=MARKERS[place // len(COLOURS) % len(MARKERS)],
            dashed=method not in plain,
        )
    return found


# ------------------------------------------------------------------------------------------ what is drawn

MEASURES: tuple[tuple[str, Measure], ...] = (
    ("all classes seen", lambda accuracy: accuracy.overall),
    ("base classes", lambda accuracy: accuracy.base),
    ("novel classes", lambda accuracy: accuracy.novel),
)


def session_panels(runs: Sequence[Run], found: Mapping[str, Look]) -> list[Panel]:
    """Accuracy after each session, over all, base and novel classes, with a band of one standard deviation."""
    panels = []
    for title, measure in MEASURES:
        lines = {method: points(of(runs, method), measure) for method in methods_of(runs)}
        lines = {method: line for method, line in lines.items() if line}
        alt = _alt(f"Accuracy on {title} after each session, in percent. After the last one", lines)
        panel = _panel(f"Accuracy on {title}", alt, lines, found, ("session", "accuracy, %"), percent=True)
        panels.append(panel)
    return [panel for panel in panels if panel.svg]


def balance_panel(rows: Sequence[Row], found: Mapping[str, Look]) -> Panel | None:
    """Base against novel accuracy after the last session: a point for each method."""
    return _scatter("Base against novel, after the last session", rows, found, "base", "novel")


BUDGETS = (("images", "images drawn"), ("VLM tokens", "VLM tokens"), ("seconds", "seconds of computing"))


def budget_panels(rows: Sequence[Row], found: Mapping[str, Look]) -> list[Panel]:
    """Accuracy after the last session against what it took: images, VLM tokens, seconds."""
    panels = (_scatter(f"A_last against {said}", rows, found, name, "A_last") for name, said in BUDGETS)
    return [panel for panel in panels if panel is not None]


TUNED: tuple[tuple[str, Callable[[Mapping[str, float]], float | None]], ...] = (
    ("SSIM to the failures (positives)", lambda means: means.get("ssim_positive")),
    ("SSIM to the hardest negatives", lambda means: means.get("ssim_negative")),
    ("SSIM to the failures minus to the negatives", lambda means: _contrast(means)),
    ("Loss", lambda means: means.get("loss")),
)


def _contrast(means: Mapping[str, float]) -> float | None:
    both = means.get("ssim_positive"), means.get("ssim_negative")
    return None if both[0] is None or both[1] is None else both[0] - both[1]


def tuning_panels(runs: Sequence[Run], found: Mapping[str, Look]) -> list[Panel]:
    """What tuning did to distances: means over the updates of each tuning, in the order of session and epoch."""
    places = sorted({(point.session, point.epoch) for run in runs for point in run.tunings})
    panels = []
    for title, value in TUNED:
        lines = {method: _tuned(of(runs, method), value, places) for method in methods_of(runs)}
        lines = {method: line for method, line in lines.items() if line}
        alt = _alt(f"{title}, mean over the updates of each tuning. At the last one", lines)
        if lines:
            panels.append(_panel(title, alt, lines, found, ("session.epoch", ""), ticks=places))
    return panels


def _tuned(
    runs: Sequence[Run],
    value: Callable[[Mapping[str, float]], float | None],
    places: Sequence[tuple[int, int]],
) -> list[Point]:
    values: dict[tuple[int, int], list[float]] = {}
    for point in (point for run in runs for point in run.tunings):
        if (found := value(point.means)) is not None:
            values.setdefault((point.session, point.epoch), []).append(found)
    at = {place: n for n, place in enumerate(places)}
    line = [(float(at[place]), *_spread(seen)) for place, seen in sorted(values.items())]
    return thinned(line, POINTS)


def thinned(line: Sequence[Point], most: int) -> list[Point]:
    """A line of at most so many points: equal parts of a longer one are averaged."""
    if len(line) <= most:
        return list(line)
    cuts = [round(n * len(line) / most) for n in range(most + 1)]
    parts = [line[start:end] for start, end in pairwise(cuts)]
    return [tuple(fmean(values) for values in zip(*part, strict=True)) for part in parts]  # type: ignore[misc]


def _spread(values: Sequence[float]) -> tuple[float, float]:
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def methods_of(runs: Sequence[Run]) -> list[str]:
    """The methods of runs, each once, in order."""
    return list(dict.fromkeys(run.method for run in runs))


def of(runs: Sequence[Run], method: str) -> list[Run]:
    """The runs of one method."""
    return [run for run in runs if run.method == method]


def _alt(opening: str, lines: Mapping[str, Sequence[Point]]) -> str:
    last = sorted(((line[-1][1], method) for method, line in lines.items()), reverse=True)
    return f"{opening}: " + ", ".join(f"{method} {value:.4g}" for value, method in last) + "."


# ------------------------------------------------------------------------------------------ drawing


def _panel(
    title: str,
    alt: str,
    lines: Mapping[str, Sequence[Point]],
    found: Mapping[str, Look],
    labels: tuple[str, str],
    *,
    percent: bool = False,
    ticks: Sequence[tuple[int, int]] = (),
) -> Panel:
    def draw(axes: Axes) -> None:
        for method, line in lines.items():
            _line(axes, line, found[method])
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if percent:
            axes.set_ylim(0, 100)
        if ticks:
            names = [f"{session}.{epoch}" for session, epoch in ticks]
            inside = range(len(names))
            axes.xaxis.set_major_formatter(
                lambda x, _: names[int(x)] if int(x) in inside and x == int(x) else ""
            )

    return Panel(title=title, alt=alt, svg=_svg(title, draw) if lines else "")


def _scatter(title: str, rows: Sequence[Row], found: Mapping[str, Look], x: str, y: str) -> Panel | None:
    cells = [(row, row.cell(x), row.cell(y)) for row in rows]
    known = [(row.method, at, value) for row, at, value in cells if at is not None and value is not None]
    if not known:
        return None
    scale = 100 if COLUMN[x].percent else 1

    def draw(axes: Axes) -> None:
        for method, at, value in known:
            look = found[method]
            across = scale * at.std if at.std and COLUMN[x].percent else None
            up = 100 * value.std if value.std else None
            drawn = axes.errorbar(
                scale * at.mean,
                100 * value.mean,
                up,
                across,
                **_shape(look),
                markersize=7,
                elinewidth=1,
                ls="",
            )
            for part in drawn.get_children():
                part.set_gid(f"method-{look.index}")
        axes.set_xlabel(f"{x}, %" if scale == 100 else x)
        axes.set_ylabel(f"{y}, %")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(0.08)

    said = ", ".join(f"{m} {scale * at.mean:,.4g} and {100 * v.mean:.1f} %" for m, at, v in known)
    return Panel(title=title, alt=f"{title}, by method: {said}.", svg=_svg(title, draw))


def _line(axes: Axes, line: Sequence[Point], look: Look) -> None:
    at, means, spreads = zip(*line, strict=True)
    shape = _shape(look) if len(line) <= MARKED_POINTS else {"color": COLOURS[look.colour]}
    dashes = "--" if look.dashed else "-"
    gid = f"method-{look.index}"
    axes.plot(at, means, linestyle=dashes, linewidth=1.6, markersize=4.5, gid=gid, **shape)
    if any(spreads):
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(at, low, high, color=COLOURS[look.colour], alpha=0.12, linewidth=0, gid=gid)


def _shape(look: Look) -> dict:
    """Colour and marker; hollow where the line is dashed."""
    colour = COLOURS[look.colour]
    return {"color": colour, "marker": look.marker, "markerfacecolor": "none" if look.dashed else colour}


def _svg(title: str, draw: Callable[[Axes], None]) -> str:
    settings = {
        **style(INK),
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "grid.color": LINE,
        "grid.alpha": 1.0,
    }
    with rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots())
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    return themed(out.getvalue())


def themed(svg: str) -> str:
    """An SVG for the page: its colours, fonts and methods those of the page, no size, no ids that may clash."""
    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'<g id="method-(\d+)">', r'<g data-method="\1">', text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 system-ui, sans-serif", text)
    text = re.sub(r"font-family: [^;\"]+", "font-family: system-ui, sans-serif", text)
    text = text.replace(INK, "currentColor").replace(LINE, "var(--line)")
    for n, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--m{n})")
    return re.sub(r"\n\s*", "\n", text).strip()


def numbered(panels: Sequence[Panel]) -> Iterator[Panel]:
    """The panels with ids that are unique on the page."""
    for n, panel in enumerate(panels):
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{n}-", panel.svg)
        yield panel.model_copy(update={"svg": text})
