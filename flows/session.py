"""One FSCIL session: draw A_0, run epochs until validation says stop, then count the test set once.

Where the VLM itself classifies there is nothing to draw and no epoch to run: its session is the count alone.
"""

from dataclasses import dataclass
from pathlib import Path

from prefect import flow

from flows.config import ExperimentConfig
from flows.epoch import run_epoch
from flows.interrupts import interrupts_first, raise_unheeded
from flows.progress import say, say_epoch, session_line, show_session, tag_run
from tasks.context import EpochContext
from tasks.evaluate import evaluate_test, evaluate_zero_shot
from tasks.records import (
    ArtifactRef,
    AugmentationSet,
    EpochRecord,
    LoopState,
    SessionRecord,
    StageRecord,
    TestEvaluation,
    Usage,
)
from tasks.regenerate import regenerate
from tasks.store import artifacts_of, export, write_json
from tasks.tracking import Tracker
from tasks.versions import RunVersions
from tasks.whereabouts import inside

Initial = StageRecord[AugmentationSet] | None


@dataclass(frozen=True)
class _Learned:
    """What a session's epochs left: A_0, their records, why they stopped, and the state they ended with."""

    initial: Initial
    epochs: list[EpochRecord]
    stop: str
    end: LoopState


@flow(
    name="session",
    flow_run_name="{config.dataset.name} · {config.method} · seed {config.seed} · session {index}",
    persist_result=False,
    validate_parameters=False,
)
def run_session(
    config: ExperimentConfig,
    index: int,
    context: EpochContext,
    test_ref: ArtifactRef,
    folder: Path,
    vlm_url: str | None,
    tracker: Tracker,
    versions: RunVersions,
) -> SessionRecord:
    """Run one session from the state the one before ended with.

    Args:
        config: the experiment's settings.
        index: the session's number, 0 for the base session.
        context: epoch 0 of this session; its start is the end of the session before.
        test_ref: the test images, handed to the sealing evaluation alone.
        folder: the session's results folder.
        vlm_url: address of a VLM started by the run, if any.
        tracker: mirrors sealed records into MLflow.
        versions: keeps the run's folder in DVC's cache.
    """
    with interrupts_first():  # no decorator, which Ray could not send
        tag_run(*config.tags)
        if config.zero_shot:
            tracker.session_start(index, None, folder / "initial")
            learned = _Learned(None, [], "the VLM classifies and learns nothing", context.start)
            test = evaluate_zero_shot(context, test_ref, config.vlm, vlm_url)
        else:
            learned = _learn(config, index, context, folder, vlm_url, tracker, versions)
            assert learned.end.classifier is not None, "an epoch always leaves a classifier"
            test = evaluate_test(context, test_ref, learned.end.classifier, config.trained)
        export(context.store, artifacts_of(test), test, folder / "test")
        session = _sealed(context, index, learned, test)
        write_json(folder / "record.json", session)
        versions.keep()
        tracker.session(session, folder, context.class_names)
        say(session_line(session))
        show_session(config, session, learned.epochs, folder, tracker.page(index))
        return session


def _learn(
    config: ExperimentConfig,
    index: int,
    context: EpochContext,
    folder: Path,
    vlm_url: str | None,
    tracker: Tracker,
    versions: RunVersions,
) -> _Learned:
    initial: Initial = None
    if config.augmenter.draws:
        initial = regenerate(context, 0, config.augmenter, config.drawer, context.start.adapter, None)
        export(context.store, artifacts_of(initial), initial, folder / "initial")
        context = _starting(context, 0, context.start.model_copy(update={"augmentation": initial.output}))
    tracker.session_start(index, initial, folder / "initial")

    records: list[EpochRecord] = []
    stop: str | None = None
    while stop is None:
        history = [record.evaluate.output.validation.overall for record in records]
        with inside(f"epoch {context.epoch}"):
            record, stop = run_epoch(context, config, vlm_url, history)
        epoch_folder = folder / f"epoch-{record.epoch:03d}"
        export(context.store, artifacts_of(stages_of(record)), record, epoch_folder)
        versions.keep()
        tracker.epoch(record, epoch_folder)
        say_epoch(record)
        records.append(record)
        raise_unheeded()
        context = _starting(context, record.epoch + 1, record.next)
    return _Learned(initial, records, stop, records[-1].next)


def _sealed(
    context: EpochContext, index: int, learned: _Learned, test: StageRecord[TestEvaluation]
) -> SessionRecord:
    """The session's record, with all that its epochs and its sealing evaluation drew and asked."""
    drawn = [learned.initial, *(record.regenerate for record in learned.epochs)]
    compared = [record.compare.output for record in learned.epochs if record.compare]
    return SessionRecord(
        run=context.run,
        session=index,
        initial=learned.initial,
        epochs=len(learned.epochs),
        converged_because=learned.stop,
        end=learned.end,
        test=test,
        images_drawn=sum(stage.output.count for stage in drawn if stage is not None),
        drawing=Usage.total(stage.output.usage for stage in drawn if stage is not None),
        usage=Usage.total([*(output.usage for output in compared), test.output.usage]),
        unparsed=sum(output.unparsed for output in compared) + test.output.unparsed,
    )


def stages_of(record: EpochRecord) -> tuple[object, ...]:
    """The stage records of an epoch; what its start refers to was exported by the epoch before."""
    return (record.train, record.evaluate, record.mine, record.compare, record.tune, record.regenerate)


def _starting(context: EpochContext, epoch: int, start: LoopState) -> EpochContext:
    return context.model_copy(update={"epoch": epoch, "start": start})
