"""Stage 5, tune_lora (paper: The Contrastive Finetuning Strategy, Eq. 3-8).

Reads:   triplets, verdicts, the images they name, adapter k.
Returns: Tuning - reference to adapter k+1, every loss term by update, the steps drawn.
Writes:  adapter/pytorch_lora_weights.safetensors
"""

from collections.abc import Iterator

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.augmentation import AugmenterSettings
from tasks.context import EpochContext
from tasks.diffusion import adapters
from tasks.diffusion.generator import GeneratorSettings
from tasks.diffusion.tuning import TuningExample, TuningSettings, tune
from tasks.diffusion.windows import StepsRule
from tasks.images import as_unit
from tasks.loading import (
    augmented_images,
    augmented_tensors,
    generator_digest,
    generator_for,
    generator_identity,
    originals,
)
from tasks.memory import within_memory
from tasks.progress import stage_bar
from tasks.records import (
    ArtifactRef,
    AugmentedImage,
    FailurePair,
    Mining,
    StageRecord,
    Triplet,
    Tuning,
    Verdict,
)
from tasks.seeding import seed_for
from tasks.store import StageFolder, read_lines

VERSION = 2  # 2: a centre is contrasted with the failures that it was compared with


@task(
    name="tune_lora",
    task_run_name="tune_lora · session {context.session} · epoch {context.epoch}",
    cache_policy=NO_CACHE,
    persist_result=False,
)
def tune_lora(
    context: EpochContext,
    mining: Mining,
    verdicts: ArtifactRef | None,
    augmenter: AugmenterSettings,
    generator: GeneratorSettings,
    tuning: TuningSettings,
) -> StageRecord[Tuning]:
    """Pull the generator towards what was got wrong and away from what was got right too easily."""
    assert augmenter.tuning != "none", "the epoch asks for tuning only where the augmenter tunes"
    rule: StepsRule = augmenter.tuning
    start, seed = context.start, seed_for(context.seed, context.session, context.epoch, "tune_lora")

    @within_memory("tuning.batch or generator.size")
    def compute(work: StageFolder) -> Tuning:
        examples = list(examples_of(context, mining, verdicts, generator.size, seed))
        if not examples:
            return Tuning(
                adapter=None, updates=0, series={}, steps_drawn=(), skipped_because="no failure to learn from"
            )
        model = generator_for(context, generator, start.adapter)
        place = f"session {context.session} epoch {context.epoch}"
        with stage_bar("tuning", place, "update", tuning.updates) as at:
            result = tune(
                model,
                examples,
                tuning,
                steps_rule=rule,
                seed=seed,
                progress=lambda done, total: at("", done, total),
            )
        adapters.save(model.unet, work.path / "adapter")
        return Tuning(
            adapter=work.ref("adapter", "adapter"),
            updates=len(result.steps_drawn),
            series={name: tuple(values) for name, values in result.series.items()},
            steps_drawn=tuple(result.steps_drawn),
        )

    augmentation = start.augmentation
    assert augmentation is not None, "tuning needs a generated set to contrast with"
    return context.store.run(
        "tune_lora",
        VERSION,
        settings={
            "tuning": tuning.model_dump(),
            "generator": generator_identity(generator),
            "rule": rule,
        },
        inputs={
            "triplets": mining.triplets.digest,
            "pairs": mining.pairs.digest,
            "verdicts": verdicts.digest if verdicts else None,
            "manifest": augmentation.manifest.digest,
            "adapter": start.adapter.digest if start.adapter else None,
            "generator": generator_digest(generator),
        },
        seed=seed,
        output=Tuning,
        compute=compute,
    )


def examples_of(
    context: EpochContext, mining: Mining, verdicts: ArtifactRef | None, size: int, seed: int
) -> Iterator[TuningExample]:
    """Each centre with each failure it is compared with: a rewritten one only with the original it was rewritten for."""
    store, images = context.store, {image.id: image for image in augmented_images(context)}
    triplets = {(t.label, t.positive.id): t for t in read_lines(store.locate(mining.triplets), Triplet)}
    judged = {v.augmented_id: v for v in (read_lines(store.locate(verdicts), Verdict) if verdicts else [])}
    for pair in read_lines(store.locate(mining.pairs), FailurePair):
        verdict = judged.get(pair.augmented_id)
        if verdict and verdict.target_id not in (None, pair.original.id):
            continue
        triplet = triplets[pair.label, pair.original.id]
        yield _example(context, images, pair.augmented_id, triplet, verdict, size, seed)


def _example(
    context: EpochContext,
    images: dict[str, AugmentedImage],
    centre: str,
    triplet: Triplet,
    verdict: Verdict | None,
    size: int,
    seed: int,
) -> TuningExample:
    negatives = [images[name] for name in triplet.negatives]
    return TuningExample(
        prompt=verdict.prompt_next if verdict else images[centre].prompt,
        level=verdict.level if verdict else "semantic",
        positive=as_unit(originals(context, [triplet.positive], size))[0],
        negatives=as_unit(augmented_tensors(context, negatives, size)),
        seed=seed_for(seed, centre, triplet.positive.id),
    )
