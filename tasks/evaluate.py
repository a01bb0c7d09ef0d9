"""Stage 2, evaluate (paper: Method Overview; Evaluation Metrics).

Reads:   the classifier, the session's validation images, augmentation set A_k.
Returns: Evaluation - predictions and integer counts per class.
Writes:  predictions.jsonl

:func:`evaluate_test` seals a session: it alone is handed the test images, after the last epoch, and
what it returns goes into the session's record and nowhere else. :func:`evaluate_zero_shot` takes its place
where the VLM itself classifies (Table 4, first row); its answers go to the state's cache one by one.
"""

from collections.abc import Sequence

import torch
from prefect import task
from prefect.cache_policies import NO_CACHE
from torch import Tensor
from tqdm import tqdm

from tasks.classification.metrics import predictions_from_logits
from tasks.context import EpochContext
from tasks.learners.factory import LearnerSettings
from tasks.loading import (
    augmented_images,
    augmented_tensors,
    backbone_digest,
    learner_for,
    learner_identity,
    load_session,
    original_paths,
    originals,
    session_of,
    training_data,
    vlm_digest,
    vlm_for,
)
from tasks.memory import within_memory
from tasks.records import (
    ArtifactRef,
    AugmentedImage,
    Evaluation,
    ImageRef,
    Prediction,
    Session,
    SessionAccuracy,
    StageRecord,
    TestEvaluation,
)
from tasks.store import StageFolder, write_lines
from tasks.vlm.cassette import write_transcript
from tasks.vlm.client import VlmSettings
from tasks.vlm.zero_shot import Classified, classify

VERSION = 1


@task(
    name="evaluate",
    task_run_name="evaluate · session {context.session} · epoch {context.epoch}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def evaluate(
    context: EpochContext, classifier: ArtifactRef, learner: LearnerSettings
) -> StageRecord[Evaluation]:
    """Predict the validation images (or the shots under leave-one-out) and A_k."""

    @within_memory("dataset.size")
    def compute(work: StageFolder) -> Evaluation:
        session = session_of(context)
        model = learner_for(context, learner, classifier)
        if session.val_rule == "leave_one_out":
            logits = model.predict_shots(training_data(context, session), session.seen_classes)
        else:
            logits = model.predict(originals(context, session.val), session.seen_classes)
        val = _predictions(session.validation, logits, session)
        generated = augmented_images(context)
        aug: list[Prediction] = []
        if generated:
            logits = model.predict(augmented_tensors(context, generated), session.seen_classes)
            aug = _predictions(generated, logits, session)
        write_lines(work.path / "predictions.jsonl", [*val, *aug])
        return Evaluation(
            predictions=work.ref("predictions.jsonl", "predictions"),
            validation=SessionAccuracy.of(context.session, context.n_base, val),
            augmented=SessionAccuracy.of(context.session, context.n_base, aug),
        )

    augmentation = context.start.augmentation
    return context.store.run(
        "evaluate",
        VERSION,
        settings={"learner": learner_identity(learner, None), "size": context.dataset.size},
        inputs={
            "session": context.session_ref.digest,
            "classifier": classifier.digest,
            "backbone": backbone_digest(learner.backbone),
            "images": augmentation.images.digest if augmentation else None,
            "manifest": augmentation.manifest.digest if augmentation else None,
        },
        seed=0,
        output=Evaluation,
        compute=compute,
    )


@task(
    name="evaluate_test",
    task_run_name="evaluate_test · session {context.session}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def evaluate_test(
    context: EpochContext,
    test_ref: ArtifactRef,
    classifier: ArtifactRef,
    learner: LearnerSettings,
) -> StageRecord[TestEvaluation]:
    """Count the test predictions of a finished session, once."""

    @within_memory("dataset.size")
    def compute(work: StageFolder) -> TestEvaluation:
        session = load_session(context.store, test_ref)
        model = learner_for(context, learner, classifier)
        logits = model.predict(originals(context, session.test), session.seen_classes)
        predictions = _predictions(session.test, logits, session)
        write_lines(work.path / "test-predictions.jsonl", predictions)
        return TestEvaluation(
            predictions=work.ref("test-predictions.jsonl", "predictions"),
            accuracy=SessionAccuracy.of(context.session, context.n_base, predictions),
        )

    return context.store.run(
        "evaluate_test",
        VERSION,
        settings={"learner": learner_identity(learner, None), "size": context.dataset.size},
        inputs={
            "test": test_ref.digest,
            "classifier": classifier.digest,
            "backbone": backbone_digest(learner.backbone),
        },
        seed=0,
        output=TestEvaluation,
        compute=compute,
    )


@task(
    name="evaluate_zero_shot",
    task_run_name="evaluate_zero_shot · session {context.session}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def evaluate_zero_shot(
    context: EpochContext, test_ref: ArtifactRef, vlm: VlmSettings, vlm_url: str | None
) -> StageRecord[TestEvaluation]:
    """Count the classes that the VLM names for the test images of a session, once. Nothing was learned."""
    session = load_session(context.store, test_ref)
    names = [context.class_names[label] for label in session.seen_classes]

    @within_memory("vlm.batch")
    def compute(work: StageFolder) -> TestEvaluation:
        with tqdm(desc=f"session {context.session}: VLM names classes", disable=None, leave=False) as bar:
            found = classify(
                vlm_for(context, vlm, vlm_url),
                original_paths(context, session.test),
                names,
                vlm.max_side,
                lambda _phase, done, total: bar.set_postfix_str(f"{done}/{total}"),
            )
        predictions = _named(session, found)
        write_lines(work.path / "test-predictions.jsonl", predictions)
        write_transcript(work.path / "test-transcript.jsonl", found.exchanges)
        return TestEvaluation(
            predictions=work.ref("test-predictions.jsonl", "predictions"),
            accuracy=SessionAccuracy.of(context.session, context.n_base, predictions),
            unparsed=found.unparsed,
            usage=found.usage,
            transcript=work.ref("test-transcript.jsonl", "transcript"),
        )

    return context.store.run(
        "evaluate_zero_shot",
        VERSION,
        settings={"vlm": vlm.identity, "names": names},
        inputs={"test": test_ref.digest, "vlm": vlm_digest(vlm)},
        seed=0,
        output=TestEvaluation,
        compute=compute,
    )


def _named(session: Session, found: Classified) -> list[Prediction]:
    classes = [None if place is None else session.seen_classes[place] for place in found.places]
    return [
        Prediction(image_id=image.id, label=image.label, predicted=named, margin=None)
        for image, named in zip(session.test, classes, strict=True)
    ]


def _predictions(
    images: Sequence[ImageRef] | Sequence[AugmentedImage], logits: Tensor, session: Session
) -> list[Prediction]:
    labels = torch.tensor([image.label for image in images])
    return predictions_from_logits([image.id for image in images], labels, logits, session.seen_classes)
