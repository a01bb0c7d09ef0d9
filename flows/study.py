"""What the method does, shown on sealed runs; nothing is trained, and no test image is read.

``build_study`` reads every run below a results folder and writes ``study.md``, ``study.json`` and a plot for each
dataset, for whatever methods and seeds exist:

    (a) the share of generated images whose read attributes are those of the class's real images, set by set
    (b) SSIM to the positives minus SSIM to the negatives, before and after each tuning, by the verdict's level
    (c) a distance between generated and real images in the features of a network that the loop never saw
    (d) accuracy after the last session, over all and over novel classes
    (e) which denoising step settles what (``fscil windows``)

Measurements (a), (b), (c) and (e) are sealed in the state; (d) is read off the records, where test accuracies are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from flows.config import ExperimentConfig, WindowsConfig, load_windows, stored_config
from flows.experiment import Split
from flows.measures import real_measure, set_measure, tuning_measure
from flows.reading import knows
from flows.results import Run, collect
from flows.study_page import Place, RealRow, SetRow, Study, TuningRow, changes, lines, page
from flows.study_plots import draw_study
from flows.tables import table
from flows.windows import WindowsMeasure, measure_windows
from tasks.context import EpochContext
from tasks.loading import generator_digest
from tasks.records import ArtifactRef, Digest, EpochRecord, Frozen, StageRecord
from tasks.store import Store, StoreError, write_atomic, write_json

Kind = Literal["png", "svg"]
KINDS: tuple[Kind, ...] = ("png", "svg")


def build_study(
    runs: Path, out: Path, state: Path, examples: int, overrides: Sequence[str] = ()
) -> list[Path]:
    """Measure and write.

    Args:
        runs: results folder.
        out: where to write; made if need be.
        state: state folder of those runs, which holds what their records refer to.
        examples: how many examples of each level are drawn for (b), at most.
        overrides: settings of (e), such as ``windows.images=2``.

    Returns:
        The files written.

    Raises:
        ValueError: there is no run, a record of another version, or a wrong setting.
        StoreError: the state no longer holds what a record refers to.
    """
    found = collect(runs, state)
    study = measure(found, state, examples, overrides)
    write_json(out / "study.json", study)
    files: dict[str, str | bytes] = {"study.md": page(study, table(found))}
    for dataset in study.datasets:
        shares = lines(study.sets, dataset, lambda one: one.shares["all"])
        distances = lines(study.sets, dataset, lambda one: one.distance)
        for kind in KINDS:
            files[f"study-{dataset}.{kind}"] = draw_study(
                dataset, shares, distances, changes(study.tunings, dataset), study.windows.get(dataset), kind
            )
    for name, content in files.items():
        write_atomic(out / name, content)
    return [out / name for name in ("study.json", *files)]


def measure(runs: Sequence[Run], state: Path, examples: int, overrides: Sequence[str]) -> Study:
    """All measurements of runs that drew images, in the runs' order. Raises as :func:`build_study`."""
    sets: list[SetRow] = []
    tunings: list[TuningRow] = []
    real: dict[tuple[str, int], RealRow] = {}
    windows: dict[str, WindowsMeasure] = {}
    skipped: list[str] = []
    for run in tqdm(runs, desc="study", unit="run", disable=None, leave=False):
        epochs = list(_epochs(run, state))
        if not epochs:
            continue
        readable, current = knows(epochs[0].context.class_names), all(_is_current(one) for one in epochs)
        if not readable:
            skipped.append(f"{run.dataset}: (a) and (c), since the miniature cannot read its classes")
        if not current:
            skipped.append(
                f"{epochs[0].context.run}: (b) and (e), since its generator's weights are not there any more"
            )
        for one in epochs if readable else ():
            sets.append(SetRow(place=one.place, found=set_measure(one.context)))
            session = one.place.session
            measured = real_measure(one.context)
            real[run.dataset, session] = RealRow(dataset=run.dataset, session=session, found=measured)
        tunings += [row for one in epochs if current and (row := _tuning(one, examples))]
        if current and run.dataset not in windows:
            windows[run.dataset] = measure_windows(_windows_of(epochs[0].config, readable, overrides))
    return Study(
        sets=tuple(sets),
        tunings=tuple(tunings),
        real=tuple(real.values()),
        windows=windows,
        skipped=tuple(dict.fromkeys(skipped)),
    )


class Epoch(Frozen):
    """A sealed epoch that began with a generated set, as its stages saw it."""

    place: Place
    context: EpochContext
    record: EpochRecord
    config: ExperimentConfig


def _tuning(epoch: Epoch, examples: int) -> TuningRow | None:
    """(b) of an epoch; None if it tuned nothing."""
    tuned = epoch.record.tune
    if tuned is None or tuned.output.adapter is None:
        return None
    found = tuning_measure(epoch.context, epoch.record, tuned, epoch.config.generator, examples)
    return TuningRow(place=epoch.place, found=found)


def _epochs(run: Run, state: Path) -> Iterator[Epoch]:
    for file in sorted(run.folder.glob("session-*/epoch-*/record.json")):
        record = EpochRecord.model_validate_json(file.read_text("utf-8"))
        if record.start.augmentation is None:
            continue
        config = stored_config(run.folder)
        runtime = config.runtime.model_copy(update={"state": state})
        config = config.model_copy(update={"runtime": runtime})
        wanted = record.evaluate.inputs["session"]
        session_ref, class_names = _session_of(Store(state), run, config.dataset.n_sessions, wanted, file)
        context = EpochContext(
            run=record.run,
            seed=run.seed,
            session=record.session,
            epoch=record.epoch,
            session_ref=session_ref,
            start=record.start,
            class_names=class_names,
            n_base=config.dataset.n_base,
            dataset=config.dataset,
            runtime=runtime,
        )
        place = Place(
            dataset=run.dataset, method=run.method, seed=run.seed, session=record.session, epoch=record.epoch
        )
        yield Epoch(place=place, context=context, record=record, config=config)


def _session_of(
    store: Store, run: Run, n_sessions: int, wanted: Digest | None, asked_by: Path
) -> tuple[ArtifactRef, tuple[str, ...]]:
    """The sealed session, its test images apart, and the category words of the run's dataset.

    Splits of one dataset with fewer or more sessions, or other words, may have the session in common.
    """
    for file in sorted((store.root / "stages" / "split").glob("*/record.json")):
        split = StageRecord[Split].model_validate_json(file.read_text("utf-8")).output
        if len(split.train) != n_sessions + 1:
            continue
        if run.record is not None and split.class_names != run.record.class_names:
            continue
        for ref in split.train:
            if ref.digest == wanted:
                return ref, split.class_names
    raise StoreError(
        f"{store.root} no longer holds the session that {asked_by} refers to; give the state folder of that run, "
        "or run it again"
    )


def _is_current(epoch: Epoch) -> bool:
    """Whether the base weights that the epoch tuned and drew with are those that are there now."""
    saw = [stage.inputs["generator"] for stage in (epoch.record.tune, epoch.record.regenerate) if stage]
    try:
        return all(digest == generator_digest(epoch.config.generator) for digest in saw)
    except ValueError:
        return False


def _windows_of(config: ExperimentConfig, readable: bool, overrides: Sequence[str]) -> WindowsConfig:
    """The run's generator, with the prompts that it knows."""
    prompts = "miniature" if readable else "stable_diffusion"
    chosen = load_windows([f"windows={prompts}", *overrides])
    return chosen.model_copy(update={"generator": config.generator, "runtime": config.runtime})
