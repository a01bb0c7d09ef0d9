"""The study's numbers: what one row is, how rows are averaged over seeds, and the Markdown page."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from urllib.parse import quote

from flows.formats import markdown_text
from flows.measures import LOOKS, ContrastChange, RealMeasure, SetMeasure, TuningMeasure
from flows.results import METHODS
from flows.tables import HEADINGS, Row, Statistic
from flows.windows import NOTE, WindowsMeasure, advice, windows_table
from tasks.records import Frozen

At = tuple[int, int]


class Place(Frozen):
    """Whose measurement it is."""

    dataset: str
    method: str
    seed: int
    session: int
    epoch: int


class SetRow(Frozen):
    """(a) and (c) of the set A_epoch of one session's new classes."""

    place: Place
    found: SetMeasure


class TuningRow(Frozen):
    """(b) of one tuning."""

    place: Place
    found: TuningMeasure


class RealRow(Frozen):
    """What (a) and (c) are of real images: how good a generated set could look."""

    dataset: str
    session: int
    found: RealMeasure


class Study(Frozen):
    """All numbers behind the page. ``windows`` by dataset; ``skipped`` says what was left out, and why."""

    sets: tuple[SetRow, ...]
    tunings: tuple[TuningRow, ...]
    real: tuple[RealRow, ...]
    windows: dict[str, WindowsMeasure]
    skipped: tuple[str, ...]

    @property
    def datasets(self) -> list[str]:
        """The datasets that anything was measured of."""
        places = [row.place for row in self.sets] + [row.place for row in self.tunings]
        return list(dict.fromkeys(place.dataset for place in places))


# ------------------------------------------------------------------------------------------ averages


def lines(
    rows: Iterable[SetRow], dataset: str, value: Callable[[SetMeasure], float | None]
) -> dict[str, dict[At, Statistic]]:
    """A value over seeds, by method and (session, epoch); only where it has one."""
    found: dict[str, dict[At, list[float]]] = {}
    for row in rows:
        if row.place.dataset == dataset and (number := value(row.found)) is not None:
            at = (row.place.session, row.place.epoch)
            found.setdefault(row.place.method, {}).setdefault(at, []).append(number)
    return {
        method: {at: statistic for at, values in by.items() if (statistic := Statistic.of(values))}
        for method, by in found.items()
    }


def changes(rows: Iterable[TuningRow], dataset: str) -> dict[tuple[str, str], tuple[Statistic, Statistic]]:
    """(b) before and after, by (method, level): mean over a run's tunings, then over seeds."""
    return _over_seeds(rows, dataset, lambda change: change.difference)


def _over_seeds(
    rows: Iterable[TuningRow], dataset: str, pair: Callable[[ContrastChange], tuple[float, float]]
) -> dict[tuple[str, str], tuple[Statistic, Statistic]]:
    found: dict[tuple[str, str], dict[int, list[tuple[float, float]]]] = {}
    for row in rows:
        if row.place.dataset == dataset:
            for change in row.found.levels:
                key = (row.place.method, change.level)
                found.setdefault(key, {}).setdefault(row.place.seed, []).append(pair(change))
    means = {
        key: [tuple(fmean(side) for side in zip(*pairs, strict=True)) for pairs in by_seed.values()]
        for key, by_seed in found.items()
    }
    ordered = sorted(means, key=lambda key: (_rank(key[0]), key[1] != "semantic", key[1]))
    result = {}
    for key in ordered:
        before, after = (Statistic.of(side) for side in zip(*means[key], strict=True))
        assert before is not None and after is not None, "a key is there because a tuning has it"  # noqa: PT018
        result[key] = (before, after)
    return result


def _rank(method: str) -> tuple[int, str]:
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)


# ------------------------------------------------------------------------------------------ the page


def page(study: Study, rows: Sequence[Row]) -> str:
    """The study as Markdown.

    Args:
        study: all numbers.
        rows: the accuracy table of ``fscil report``.
    """
    parts = [
        "# What the method does",
        "Mean ± standard deviation over seeds; shares and accuracies in percent.",
    ]
    for dataset in study.datasets:
        picture = f"![{markdown_text(dataset)}]({quote(f'study-{dataset}.png')})"
        parts += [picture, *_sets(study, dataset), *_tunings(study, dataset)]
    parts += ["## (d) Accuracy after the last session", _accuracies(rows)]
    for dataset, measure in study.windows.items():
        parts += [
            f"## (e) {markdown_text(dataset)}: which step settles what",
            windows_table(measure),
            NOTE,
            advice(measure),
        ]
    if study.skipped:
        parts += ["## Not measured", "\n".join(f"- {markdown_text(sentence)}" for sentence in study.skipped)]
    return "\n\n".join(parts) + "\n"


def _sets(study: Study, dataset: str) -> list[str]:
    names = (*LOOKS, "all", "category")
    headings = ("method", "session.epoch", "seeds", *LOOKS, "all four", "category", "distance")
    by_name = {name: lines(study.sets, dataset, _share_of(name)) for name in names}
    distance = lines(study.sets, dataset, lambda one: one.distance)
    cells = [
        (
            method, f"{at[0]}.{at[1]}", str(found.n), *(_percent(by_name[name][method][at]) for name in names),
            _number(distance.get(method, {}).get(at)),
        )
        for method, by_place in by_name["all"].items()
        for at, found in sorted(by_place.items())
    ]  # fmt: skip
    cells += [
        (
            "*real images*", str(row.session), "–", *(f"{100 * row.found.shares[name]:.1f}" for name in names),
            "–" if row.found.distance is None else f"{row.found.distance:.3g}",
        )
        for row in study.real if row.dataset == dataset
    ]  # fmt: skip
    if not cells:
        return []
    note = (
        "Of the images generated for a session's new classes: the share in which the captioner reads the value that "
        "it reads most often in the class's real training and validation images, and the share read as the class "
        "itself. Distance: unbiased squared MMD with KID's kernel to the class's real images, mean over classes, in "
        "features of the judge, a network that no stage asks, scaled to one length (0: the same, 14: as far as can "
        "be); real images: training against validation images."
    )
    return [
        f"## (a), (c) {markdown_text(dataset)}: what the generated images look like",
        _markdown(headings, cells),
        note,
    ]


def _share_of(name: str) -> Callable[[SetMeasure], float]:
    return lambda one: one.shares[name]


def _tunings(study: Study, dataset: str) -> list[str]:
    headings = (
        "method",
        "level",
        "seeds",
        "to the positive",
        "to the negatives",
        "difference before",
        "after",
    )
    difference = changes(study.tunings, dataset)
    positive = _over_seeds(study.tunings, dataset, lambda change: change.positive)
    negative = _over_seeds(study.tunings, dataset, lambda change: change.negative)
    cells = [
        (*key, str(before.n), _arrow(positive[key]), _arrow(negative[key]), _number(before), _number(after))
        for key, (before, after) in difference.items()
    ]
    if not cells:
        return []
    note = (
        "SSIM of images drawn from a tuning's prompts on noise that it has not seen, with the adapter before and "
        "after it, to the failure that they should approach and to the images that they should leave."
    )
    return [
        f"## (b) {markdown_text(dataset)}: contrast before and after tuning",
        _markdown(headings, cells),
        note,
    ]


def _accuracies(rows: Sequence[Row]) -> str:
    kept = ("dataset", "method", "seeds", "A_last", "novel")
    cells = [dict(zip(HEADINGS, row.texts, strict=True)) for row in rows]
    return _markdown(kept, [tuple(row[name] for name in kept) for row in cells])


def _markdown(headings: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    lines_of = (headings, ["---"] * len(headings), *(map(markdown_text, line) for line in cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines_of)


def _percent(statistic: Statistic) -> str:
    spread = "" if statistic.std is None else f" ± {100 * statistic.std:.1f}"
    return f"{100 * statistic.mean:.1f}{spread}"


def _number(statistic: Statistic | None) -> str:
    if statistic is None:
        return "–"
    spread = "" if statistic.std is None else f" ± {statistic.std:.2g}"
    return f"{statistic.mean:.3g}{spread}"


def _arrow(pair: tuple[Statistic, Statistic]) -> str:
    return f"{pair[0].mean:.3f} → {pair[1].mean:.3f}"
