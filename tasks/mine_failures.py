"""Stage 3, mine_failures (paper: The VLM Coordinator; Self-contrastive finetuning strategy).

Reads:   validation and augmentation predictions, their images. Never a test image.
Returns: Mining - failure pairs for the VLM, triplets for the tuner, clusters that share a verdict.
Writes:  pairs.jsonl triplets.jsonl clusters.jsonl
"""

from collections import defaultdict

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.context import EpochContext
from tasks.images import as_unit
from tasks.loading import augmented_images, augmented_tensors, originals, session_of
from tasks.memory import within_memory
from tasks.records import ArtifactRef, AugmentedImage, ImageRef, Mining, Prediction, StageRecord
from tasks.similarity.mining import Mined, mine_class
from tasks.similarity.selection import MiningSettings
from tasks.store import StageFolder, read_lines, write_lines

VERSION = 1


@task(
    name="mine_failures",
    task_run_name="mine_failures · session {context.session} · epoch {context.epoch}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def mine_failures(
    context: EpochContext, predictions: ArtifactRef, mining: MiningSettings
) -> StageRecord[Mining]:
    """Select, class by class, what the VLM compares and what the tuner contrasts."""

    @within_memory("mining.memory_mb or mining.ssim_size")
    def compute(work: StageFolder) -> Mining:
        correct = {p.image_id: p.correct for p in read_lines(context.store.locate(predictions), Prediction)}
        wrong: dict[int, list[ImageRef]] = defaultdict(list)
        generated: dict[tuple[int, bool], list[AugmentedImage]] = defaultdict(list)
        for original in session_of(context).validation:
            if not correct[original.id]:
                wrong[original.label].append(original)
        for image in augmented_images(context):
            generated[image.label, correct[image.id]].append(image)
        mined = [
            mine_class(
                wrong[label],
                as_unit(originals(context, wrong[label])),
                generated[label, True],
                as_unit(augmented_tensors(context, generated[label, True])),
                generated[label, False],
                as_unit(augmented_tensors(context, generated[label, False])),
                mining,
            )
            for label in sorted(wrong)
        ]
        return _write(
            work, mined, {k: len(v) for k, v in wrong.items()}, {k: len(generated[k, True]) for k in wrong}
        )

    augmentation = context.start.augmentation
    assert augmentation is not None, "mining needs a generated set to compare with"
    return context.store.run(
        "mine_failures",
        VERSION,
        settings={"mining": mining.model_dump(), "size": context.dataset.size},
        inputs={
            "session": context.session_ref.digest,
            "predictions": predictions.digest,
            "images": augmentation.images.digest,
            "manifest": augmentation.manifest.digest,
        },
        seed=0,
        output=Mining,
        compute=compute,
    )


def _write(
    work: StageFolder, mined: list[Mined], failures: dict[int, int], candidates: dict[int, int]
) -> Mining:
    write_lines(work.path / "pairs.jsonl", [pair for m in mined for pair in m.pairs])
    write_lines(work.path / "triplets.jsonl", [triplet for m in mined for triplet in m.triplets])
    write_lines(work.path / "clusters.jsonl", [cluster for m in mined for cluster in m.clusters])
    return Mining(
        pairs=work.ref("pairs.jsonl", "pairs"),
        triplets=work.ref("triplets.jsonl", "triplets"),
        clusters=work.ref("clusters.jsonl", "clusters"),
        failures=dict(sorted(failures.items())),
        candidates=dict(sorted(candidates.items())),
        filtered=sum(m.filtered for m in mined),
    )
