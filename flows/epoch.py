"""One epoch of the paper's loop (Figure 2): the six task calls, in order. Read this file first.

    train_classifier -> evaluate -> mine_failures -> vlm_compare -> tune_lora -> regenerate A_{k+1}

The last epoch of a session ends after evaluate, since no further set is wanted. Which of the other
stages run is the augmenter's: none without a generator, regenerate alone for a fixed one.

No task is retried by Prefect: a stage depends on sealed inputs alone, so what failed once fails again. What passes by
itself - a provider that is busy - is tried again where it is asked, in tasks/vlm, within a budget; after anything
else the same command goes on from the last sealed stage.
"""

from collections.abc import Sequence

from flows.config import ExperimentConfig
from flows.convergence import reason_to_stop
from tasks.context import EpochContext
from tasks.evaluate import evaluate
from tasks.mine_failures import mine_failures
from tasks.records import ArtifactRef, EpochRecord
from tasks.regenerate import regenerate
from tasks.train_classifier import train_classifier
from tasks.tune_lora import tune_lora
from tasks.vlm_compare import vlm_compare


def run_epoch(
    context: EpochContext, config: ExperimentConfig, vlm_url: str | None, history: Sequence[float]
) -> tuple[EpochRecord, str | None]:
    """Run one epoch; return its record and why the session stops here, if it does.

    Args:
        context: whose epoch, and the state it starts from.
        config: the experiment's settings; each task is handed only what it reads.
        vlm_url: address of the VLM that the run itself started, if it did.
        history: validation accuracies of the session's earlier epochs.
    """
    augmenter = config.augmenter
    trained = train_classifier(context, config.trained)
    classifier = trained.output.classifier
    evaluated = evaluate(context, classifier, config.trained)
    record = EpochRecord(
        run=context.run,
        session=context.session,
        epoch=context.epoch,
        start=context.start,
        train=trained,
        evaluate=evaluated,
    )
    stop = reason_to_stop([*history, evaluated.output.validation.overall], config.stopping)
    if stop or not augmenter.draws:
        return record, stop

    mined = compared = tuned = None
    verdicts: ArtifactRef | None = None
    adapter = context.start.adapter
    if augmenter.learns:
        mined = mine_failures(context, evaluated.output.predictions, config.mining)
        if augmenter.asks_vlm:
            compared = vlm_compare(context, mined.output, augmenter, config.vlm, config.generator, vlm_url)
            verdicts = compared.output.verdicts
        if augmenter.tuning != "none":
            tuned = tune_lora(context, mined.output, verdicts, augmenter, config.generator, config.tuning)
            adapter = tuned.output.adapter or adapter
    drawn = regenerate(context, context.epoch + 1, augmenter, config.drawer, adapter, verdicts)
    return record.model_copy(
        update={"mine": mined, "compare": compared, "tune": tuned, "regenerate": drawn}
    ), None
