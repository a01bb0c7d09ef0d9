"""One FSCIL session: draw A_0, run epochs until validation says stop, then count the test set once."""

from pathlib import Path

from prefect import flow

from flows.config import ExperimentConfig
from flows.epoch import run_epoch
from flows.progress import say_epoch, say_session
from tasks.context import EpochContext
from tasks.evaluate import evaluate_test
from tasks.records import (
    ArtifactRef,
    AugmentationSet,
    EpochRecord,
    LoopState,
    SessionRecord,
    StageRecord,
    Usage,
)
from tasks.regenerate import regenerate
from tasks.store import artifacts_of, export, write_json
from tasks.tracking import Tracker


@flow(name="session", flow_run_name="session {index}", persist_result=False, validate_parameters=False)
def run_session(
    config: ExperimentConfig,
    index: int,
    context: EpochContext,
    test_ref: ArtifactRef,
    folder: Path,
    vlm_url: str | None,
    tracker: Tracker,
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
    """
    initial = None
    if config.augmenter.draws:
        initial = regenerate(context, 0, config.augmenter, config.generator, context.start.adapter, None)
        export(context.store, artifacts_of(initial), initial, folder / "initial")
        context = _starting(context, 0, context.start.model_copy(update={"augmentation": initial.output}))
    tracker.session_start(index, initial, folder / "initial")

    records: list[EpochRecord] = []
    stop: str | None = None
    while stop is None:
        history = [record.evaluate.output.validation.overall for record in records]
        record, stop = run_epoch(context, config, vlm_url, history)
        epoch_folder = folder / f"epoch-{record.epoch:03d}"
        export(context.store, artifacts_of(stages_of(record)), record, epoch_folder)
        tracker.epoch(record, epoch_folder)
        say_epoch(record)
        records.append(record)
        context = _starting(context, record.epoch + 1, record.next)

    last = records[-1].next
    assert last.classifier is not None, "an epoch always leaves a classifier"
    test = evaluate_test(context, test_ref, last.classifier, config.learner)
    export(context.store, artifacts_of(test), test, folder / "test")
    session = SessionRecord(
        run=context.run,
        session=index,
        initial=initial,
        epochs=len(records),
        converged_because=stop,
        end=last,
        test=test,
        images_drawn=_images_drawn(initial, records),
        usage=_usage(records),
    )
    write_json(folder / "record.json", session)
    tracker.session(session)
    say_session(session)
    return session


def stages_of(record: EpochRecord) -> tuple[object, ...]:
    """The stage records of an epoch; what its start refers to was exported by the epoch before."""
    return (record.train, record.evaluate, record.mine, record.compare, record.tune, record.regenerate)


def _starting(context: EpochContext, epoch: int, start: LoopState) -> EpochContext:
    return context.model_copy(update={"epoch": epoch, "start": start})


def _images_drawn(initial: StageRecord[AugmentationSet] | None, records: list[EpochRecord]) -> int:
    sets = [initial, *(record.regenerate for record in records)]
    return sum(stage.output.count for stage in sets if stage is not None)


def _usage(records: list[EpochRecord]) -> Usage:
    used = [record.compare.output.usage for record in records if record.compare]
    return Usage(
        calls=sum(u.calls for u in used),
        prompt_tokens=sum(u.prompt_tokens for u in used),
        completion_tokens=sum(u.completion_tokens for u in used),
    )
