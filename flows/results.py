"""Run folders read once: what each run found, what its tunings did, and what computing it took.

A results folder holds ``<dataset>/<method>/seed-<n>``, finished or not. Each record is read once and condensed;
nothing here computes a result anew.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from pydantic import BaseModel

from tasks.records import EpochRecord, ExperimentRecord, Frozen, SessionRecord, Tuning
from tasks.store import Store, Timing
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

TUNED = ("ssim_positive", "ssim_negative", "loss")
"""Series of a tuning that are kept: similarity to the failures, to the negatives, and what was minimised."""

Model = TypeVar("Model", bound=BaseModel)


class TuningPoint(Frozen):
    """One tuning of the generator. ``means``: the mean over its updates of each series of ``TUNED`` that it has."""

    session: int
    epoch: int
    means: dict[str, float]


class Cost(Frozen):
    """What computing a run took; None where the state no longer knows it of every stage.

    Attributes:
        seconds: The sum over its stages, each as measured when it was first computed. So a kill, a resume or a
            stage shared with another run changes nothing.
        mib: The most memory that the process held in any stage, in MiB; on a GPU, that torch held there.
    """

    seconds: float | None
    mib: float | None

    @classmethod
    def of(cls, timings: Iterable[Timing | None]) -> "Cost":
        """Sum up the timings of all sealed stages of a run; None stands for one that is not known."""
        listed = list(timings)
        known = [timing for timing in listed if timing is not None]
        if not known or len(known) < len(listed):
            return cls(seconds=None, mib=None)
        held = [timing.gpu_peak_mib or timing.peak_mib for timing in known]
        most = None if None in held else max(mib for mib in held if mib is not None)
        return cls(seconds=sum(timing.seconds for timing in known), mib=most)


class Run(Frozen):
    """One run as its folder shows it. ``record`` is None while it is unfinished."""

    dataset: str
    method: str
    seed: int
    folder: Path
    record: ExperimentRecord | None
    sessions: tuple[SessionRecord, ...]
    tunings: tuple[TuningPoint, ...]
    cost: Cost


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
    return in_order(read_run(runs, folder, state) for folder in folders)


def read_run(runs: Path, folder: Path, state: Path) -> Run:
    """Read one run folder.

    Raises:
        ValueError: a record cannot be read; the message names it.
    """
    dataset, method, seed = folder.relative_to(runs).parts
    whole, store = folder / "experiment.json", Store(state)
    sessions = [_read(path, SessionRecord) for path in folder.glob("session-*/record.json")]
    timings = [store.timing(stage) for one in sessions for stage in (one.initial, one.test) if stage]
    tunings = []
    for epoch in _epochs(folder):
        timings += [store.timing(stage) for name in STAGES if (stage := getattr(epoch, name))]
        if epoch.tune is not None and (means := _means(epoch.tune.output)):
            tunings.append(TuningPoint(session=epoch.session, epoch=epoch.epoch, means=means))
    return Run(
        dataset=dataset,
        method=method,
        seed=int(seed.removeprefix("seed-")),
        folder=folder,
        record=_read(whole, ExperimentRecord) if whole.is_file() else None,
        sessions=tuple(sorted(sessions, key=lambda one: one.session)),
        tunings=tuple(sorted(tunings, key=lambda one: (one.session, one.epoch))),
        cost=Cost.of(timings),
    )


def _epochs(folder: Path) -> Iterator[EpochRecord]:
    """One after another, so that a long run's records are not all held at once."""
    return (_read(path, EpochRecord) for path in folder.glob("session-*/epoch-*/record.json"))


def _means(tuning: Tuning) -> dict[str, float]:
    return {name: fmean(tuning.series[name]) for name in TUNED if tuning.series.get(name)}


def _read(path: Path, kind: type[Model]) -> Model:
    try:
        return kind.model_validate_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not a {kind.__name__} of this version; move its run folder away and run it again"
        ) from error


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Runs by dataset, method in the order of ``METHODS``, strangers after them, and seed as a number."""
    return sorted(runs, key=lambda run: (run.dataset, *rank(run.method), run.seed))


def rank(method: str) -> tuple[int, str]:
    """Where a method stands in the tables."""
    return (METHODS.index(method) if method in METHODS else len(METHODS), method)
