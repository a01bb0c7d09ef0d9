"""Stage 1, train_classifier (paper: Implementation Details; Method Overview).

Reads:   the session's training images, augmentation set A_k, the classifier of epoch k-1.
Returns: Training - reference to the classifier's weights, loss of each pass.
Writes:  classifier/
"""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.context import EpochContext
from tasks.learners.factory import LearnerSettings
from tasks.loading import (
    backbone_digest,
    learner_for,
    learner_identity,
    names_read,
    session_of,
    training_data,
)
from tasks.memory import within_memory
from tasks.records import StageRecord, Training
from tasks.seeding import seed_for
from tasks.store import StageFolder

VERSION = 1


@task(
    name="train_classifier",
    task_run_name="train_classifier · session {context.session} · epoch {context.epoch}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def train_classifier(context: EpochContext, learner: LearnerSettings) -> StageRecord[Training]:
    """Fit the classifier on the originals and A_k for one epoch of the paper's loop."""
    seed = seed_for(context.seed, context.session, context.epoch, "train_classifier")

    @within_memory("learner.base.batch, learner.incremental.batch or dataset.size")
    def compute(work: StageFolder) -> Training:
        session = session_of(context)
        model = learner_for(context, learner)
        model.begin_session(session.new_classes, session.seen_classes)
        data = training_data(context, session)
        losses = model.learn(data, seed=seed)
        model.save(work.path / "classifier")
        generated = int(data.is_generated.sum())
        return Training(
            classifier=work.ref("classifier", "classifier"),
            losses=tuple(losses),
            originals=len(data.labels) - generated,
            generated=generated,
        )

    start = context.start
    return context.store.run(
        "train_classifier",
        VERSION,
        settings={
            "learner": learner_identity(learner, "incremental" if context.session else "base"),
            "size": context.dataset.size,
        },
        inputs={
            "session": context.session_ref.digest,
            "backbone": backbone_digest(learner.backbone),
            "classifier": start.classifier.digest if start.classifier else None,
            "images": start.augmentation.images.digest if start.augmentation else None,
            "manifest": start.augmentation.manifest.digest if start.augmentation else None,
            **names_read(context, learner),
        },
        seed=seed,
        output=Training,
        compute=compute,
    )
