"""The study's plots: what settles when, and per dataset how sets, distances and contrast change."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flows.curves import COLOURS, style, written

if TYPE_CHECKING:
    from flows.tables import Statistic
    from flows.windows import WindowsMeasure

Kind = Literal["png", "svg"]
Line = Mapping[tuple[int, int], "Statistic"]
"""A statistic over seeds by (session, epoch)."""
Bars = Mapping[tuple[str, str], tuple["Statistic", "Statistic"]]
"""Before and after tuning, by (method, level)."""


def draw_windows(measure: "WindowsMeasure", kind: Kind) -> bytes:
    """One panel by distance, and one by the judge's reading if there is one."""
    read = any(settling.read for settling in measure.settlings)
    with rc_context(style()):
        figure = Figure(figsize=(9.6 if read else 5.4, 3.8), layout="constrained")
        panels = figure.subplots(1, 2 if read else 1, squeeze=False)[0]
        settling_panel(panels[0], measure, read=False)
        if read:
            settling_panel(panels[1], measure, read=True)
        return written(figure, kind)


def settling_panel(axes: Axes, measure: "WindowsMeasure", *, read: bool) -> None:
    """Share of the images that keep the first prompt's value, by the step of the swap."""
    axes.axvline(measure.steps / 2, color="#7f7f7f", linestyle=":", linewidth=1)
    axes.axhline(50, color="#7f7f7f", linestyle=":", linewidth=1)
    for place, settling in enumerate(measure.settlings):
        values = settling.read if read else settling.kept
        if settling.images and values:
            shares = [100 * value for value in values]
            colour = COLOURS[place % len(COLOURS)]
            axes.plot(range(len(shares)), shares, color=colour, marker="o", markersize=3, label=settling.what)
    axes.set_title(
        "the judge reads the first prompt's value" if read else "image nearer to the first prompt's"
    )
    axes.set_xlabel(f"prompt swapped after step k of {measure.steps}")
    axes.set_ylabel("share of images, %")
    axes.set_ylim(-3, 103)
    axes.set_xlim(-0.5, measure.steps + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", fontsize="small")


def draw_study(
    dataset: str,
    shares: Mapping[str, Line],
    distances: Mapping[str, Line],
    contrast: Bars,
    windows: "WindowsMeasure | None",
    kind: Kind,
) -> bytes:
    """Four panels: (a) attributes, (c) distance, (b) contrast before and after tuning, (e) what settles when.

    Args:
        dataset: its name.
        shares: by method, share of generated images whose read attributes all match, in [0, 1].
        distances: by method, distance to the real images.
        contrast: SSIM to positives minus SSIM to negatives.
        windows: the premise, measured for the runs' generator; None leaves its panel empty.
        kind: file format.
    """
    with rc_context(style()):
        figure = Figure(figsize=(9.6, 7.2), layout="constrained")
        a, c, b, e = figure.subplots(2, 2).flatten().tolist()
        _lines(a, {m: _scaled(line) for m, line in shares.items()})
        a.set_title(f"{dataset}: images that match the class's real look")
        a.set_ylabel("share of images, %")
        a.set_ylim(-3, 103)
        _lines(c, {m: _plain(line) for m, line in distances.items()})
        c.set_title(f"{dataset}: distance to the real images (KID kernel)")
        c.set_ylabel("unbiased MMD², judge's features")
        _bars(b, contrast)
        if windows is not None:
            settling_panel(e, windows, read=any(s.read for s in windows.settlings))
        else:
            e.set_axis_off()
        return written(figure, kind)


Points = Mapping[tuple[int, int], tuple[float, float]]


def _scaled(line: Line) -> Points:
    return {place: (100 * s.mean, 100 * (s.std or 0.0)) for place, s in line.items()}


def _plain(line: Line) -> Points:
    return {place: (s.mean, s.std or 0.0) for place, s in line.items()}


def _lines(axes: Axes, lines: Mapping[str, Points]) -> None:
    places = sorted({place for line in lines.values() for place in line})
    at = {place: x for x, place in enumerate(places)}
    for n, (method, line) in enumerate(lines.items()):
        for session in sorted({s for s, _ in line}):
            mine = sorted(place for place in line if place[0] == session)
            axes.errorbar(
                [at[place] for place in mine],
                [line[place][0] for place in mine],
                yerr=[line[place][1] for place in mine] if any(line[place][1] for place in mine) else None,
                color=COLOURS[n % len(COLOURS)],
                marker="o",
                markersize=4,
                capsize=2,
                elinewidth=0.8,
                label=method if session == min(s for s, _ in line) else None,
            )
    axes.set_xticks(range(len(places)), [f"{session}.{epoch}" for session, epoch in places])
    axes.set_xlabel("session.epoch: the set A of the session's new classes")
    if lines:
        axes.legend(fontsize="small")


def _bars(axes: Axes, contrast: Bars) -> None:
    labels = [f"{method}\n{level}" for method, level in contrast]
    for offset, (name, colour) in enumerate((("before", COLOURS[5]), ("after", COLOURS[0]))):
        pair = [both[offset] for both in contrast.values()]
        axes.bar(
            [n + 0.4 * offset - 0.2 for n in range(len(pair))],
            [statistic.mean for statistic in pair],
            0.4,
            yerr=[statistic.std or 0.0 for statistic in pair] if any(s.std for s in pair) else None,
            color=colour,
            capsize=2,
            label=name,
        )
    axes.axhline(0, color="#7f7f7f", linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, fontsize="small" if len(labels) < 5 else "x-small")
    axes.set_title("SSIM to the positive minus to the negatives")
    if contrast:
        axes.legend(title="tuning", fontsize="small")
