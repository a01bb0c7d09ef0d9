"""What the study measures of one drawn set and of one tuning; each measurement is sealed in the state.

Real images are the training and validation images of a session's new classes. The session that is read here
holds no test image (see ``flows.experiment.seal_split``).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import torch
from torch import Tensor

from flows.reading import JUDGE, SIZE, captioned, features
from tasks.context import EpochContext
from tasks.diffusion.generator import GeneratorSettings
from tasks.diffusion.losses import similarities
from tasks.diffusion.tuning import TuningExample
from tasks.images import as_unit
from tasks.loading import (
    MINIATURE_CAPTIONER,
    augmented_images,
    augmented_tensors,
    generator_for,
    generator_identity,
    originals,
    session_of,
)
from tasks.miniature.reader import Reading
from tasks.records import ArtifactRef, Digest, EpochRecord, Frozen, ImageRef, StageRecord, Tuning
from tasks.seeding import seed_for, torch_generator
from tasks.similarity.mmd import polynomial_mmd
from tasks.store import StageFolder, digest_of
from tasks.tune_lora import examples_of

VERSION = 1
LOOKS = ("form", "style", "colour", "background")
"""Attributes that real images of a class share, whatever hand wrote them."""


class RealMeasure(Frozen):
    """How the captioner reads a session's real images.

    ``looks``: the most frequent value of each attribute, by class. ``shares``: how many real images have it, in
    [0, 1]. ``distance``: of the training to the validation images, what a perfect set would have; None without.
    """

    images: int
    looks: dict[int, dict[str, str]]
    shares: dict[str, float]
    distance: float | None


class SetMeasure(Frozen):
    """One set's images of the session's new classes.

    ``shares``: in [0, 1], how many have the look of their class's real images, by attribute, ``all`` of them
    together, and ``category``: how many are read as their class. ``distance``: mean over classes of the unbiased
    MMD^2 to the class's real images; None if no class has two of each.
    """

    images: int
    shares: dict[str, float]
    distance: float | None


class ContrastChange(Frozen):
    """Mean SSIM to the positive and to the negatives, of examples drawn before and after a tuning."""

    level: str
    examples: int
    positive: tuple[float, float]
    negative: tuple[float, float]

    @property
    def difference(self) -> tuple[float, float]:
        """SSIM to the positive minus SSIM to the negatives, before and after."""
        before, after = (p - n for p, n in zip(self.positive, self.negative, strict=True))
        return before, after


class TuningMeasure(Frozen):
    """One tuning, by the level of the verdicts; ``unjudged`` where no VLM was asked."""

    levels: tuple[ContrastChange, ...]


# ------------------------------------------------------------------------------------------ sets


def real_measure(context: EpochContext) -> RealMeasure:
    """Read the real images of the context's session."""

    def compute(_: StageFolder) -> RealMeasure:
        images = real_images(context)
        readings = captioned(_real_tensors(context, images))
        by_class = _grouped(images, readings)
        looks = {label: _usual(found) for label, found in by_class.items()}
        session = session_of(context)
        held = _features(context, [image for image in session.val if image.label in looks])
        used = _features(context, [image for image in session.train if image.label in looks])
        return RealMeasure(
            images=len(images),
            looks=looks,
            shares=matching(readings, [image.label for image in images], looks, context.class_names),
            distance=class_distance(held, used),
        )

    return context.store.run(
        "study_real",
        VERSION,
        settings={"size": SIZE},
        inputs=_inputs(context),
        seed=0,
        output=RealMeasure,
        compute=compute,
    ).output


def set_measure(context: EpochContext) -> SetMeasure:
    """Read the set that the context starts from, A_k, and compare it with the session's real images."""
    drawn = context.start.augmentation
    assert drawn is not None, "a set is measured, so there is one"

    def compute(_: StageFolder) -> SetMeasure:
        rows = [row for row in augmented_images(context) if row.source_id is not None]
        images, labels = as_unit(augmented_tensors(context, rows, SIZE)), [row.label for row in rows]
        looks = real_measure(context).looks
        seen = _grouped_features(labels, images)
        return SetMeasure(
            images=len(rows),
            shares=matching(captioned(images), labels, looks, context.class_names),
            distance=class_distance(seen, _features(context, real_images(context))),
        )

    return context.store.run(
        "study_set",
        VERSION,
        settings={"size": SIZE},
        inputs={**_inputs(context), "images": drawn.images.digest, "manifest": drawn.manifest.digest},
        seed=0,
        output=SetMeasure,
        compute=compute,
    ).output


def real_images(context: EpochContext) -> list[ImageRef]:
    """Training and validation images of the session's new classes; no test image."""
    session = session_of(context)
    return [image for image in (*session.train, *session.val) if image.label in session.new_classes]


def matching(
    readings: Sequence[Reading],
    labels: Sequence[int],
    looks: Mapping[int, Mapping[str, str]],
    class_names: Sequence[str],
) -> dict[str, float]:
    """Share of images that are read as their class looks: each attribute, ``all`` of them, and ``category``.

    Args:
        readings: one for each image.
        labels: the class of each.
        looks: the real look of each class, by attribute.
        class_names: the category word of each label.

    Raises:
        ValueError: no image.
    """
    if not readings:
        raise ValueError("no image to read; the set holds none of the session's new classes")
    right = [
        {name: getattr(reading, name) == looks[label][name] for name in LOOKS}
        for reading, label in zip(readings, labels, strict=True)
    ]
    shares = {name: fmean(row[name] for row in right) for name in LOOKS}
    named = [r.category == class_names[label] for r, label in zip(readings, labels, strict=True)]
    return {**shares, "all": fmean(all(row.values()) for row in right), "category": fmean(named)}


def class_distance(a: Mapping[int, Tensor], b: Mapping[int, Tensor]) -> float | None:
    """Mean of the kernel distance over the classes of which both have two images or more."""
    both = [label for label in a if label in b and min(len(a[label]), len(b[label])) >= 2]
    return fmean(polynomial_mmd(a[label], b[label]) for label in both) if both else None


def _usual(readings: Sequence[Reading]) -> dict[str, str]:
    """The most frequent value of each attribute; of two as frequent, the first in the alphabet."""
    counts = {name: Counter(getattr(reading, name) for reading in readings) for name in LOOKS}
    return {name: min(found, key=lambda value: (-found[value], value)) for name, found in counts.items()}


def _grouped(images: Sequence[ImageRef], readings: Iterable[Reading]) -> dict[int, list[Reading]]:
    found: dict[int, list[Reading]] = defaultdict(list)
    for image, reading in zip(images, readings, strict=True):
        found[image.label].append(reading)
    return dict(sorted(found.items()))


def _real_tensors(context: EpochContext, images: Sequence[ImageRef]) -> Tensor:
    return as_unit(originals(context, images, SIZE))


def _features(context: EpochContext, images: Sequence[ImageRef]) -> dict[int, Tensor]:
    if not images:
        return {}
    return _grouped_features([image.label for image in images], _real_tensors(context, images))


def _grouped_features(labels: Sequence[int], images: Tensor) -> dict[int, Tensor]:
    of, seen = torch.tensor(labels), features(images)
    return {label: seen[of == label] for label in sorted(set(labels))}


def _inputs(context: EpochContext) -> dict[str, Digest | None]:
    return {
        "session": context.session_ref.digest,
        "captioner": digest_of(MINIATURE_CAPTIONER),
        "judge": digest_of(JUDGE),
    }


# ------------------------------------------------------------------------------------------ tuning


def tuning_measure(
    context: EpochContext,
    record: EpochRecord,
    tuned: StageRecord[Tuning],
    generator: GeneratorSettings,
    count: int,
) -> TuningMeasure:
    """Draw examples of a tuning with the adapter before and after it, on noise that it has not seen.

    The same prompt and the same noise both times. Not the negatives' own noise: with it the image before the
    tuning would be one of its own negatives.

    Args:
        context: the epoch's, its start that of the record.
        record: the epoch's record.
        tuned: its tuning, with an adapter.
        generator: the run's.
        count: how many examples of each level are drawn, at most.
    """
    assert record.mine is not None, "a tuning learns from mined failures"
    mining, verdicts = record.mine.output, record.compare.output.verdicts if record.compare else None

    def compute(_: StageFolder) -> TuningMeasure:
        found: dict[str, list[TuningExample]] = defaultdict(list)
        for example in examples_of(context, mining, verdicts, generator.size, tuned.seed):
            found[example.level if verdicts else "unjudged"].append(example)
        return TuningMeasure(
            levels=tuple(
                _change(
                    context, level, _some(found[level], count, tuned.seed), tuned.output.adapter, generator
                )
                for level in sorted(found, reverse=True)
            )
        )

    return context.store.run(
        "study_tuning",
        VERSION,
        settings={"generator": generator_identity(generator), "examples": count},
        inputs={**tuned.inputs, "tuned": tuned.output.adapter.digest if tuned.output.adapter else None},
        seed=tuned.seed,
        output=TuningMeasure,
        compute=compute,
    ).output


def _some(examples: Sequence[TuningExample], count: int, seed: int) -> list[TuningExample]:
    chosen = torch.randperm(len(examples), generator=torch_generator(seed, "study"))[:count]
    return [examples[i] for i in chosen.tolist()]


def _change(
    context: EpochContext,
    level: str,
    examples: Sequence[TuningExample],
    adapter: ArtifactRef | None,
    settings: GeneratorSettings,
) -> ContrastChange:
    prompts = [example.prompt for example in examples]
    seeds = [seed_for(example.seed, "study") for example in examples]
    pairs = [
        contrast(generator_for(context, settings, used).draw(prompts, seeds), examples)
        for used in (context.start.adapter, adapter)
    ]
    (p_before, n_before), (p_after, n_after) = pairs
    return ContrastChange(
        level=level, examples=len(examples), positive=(p_before, p_after), negative=(n_before, n_after)
    )


def contrast(images: Tensor, examples: Sequence[TuningExample]) -> tuple[float, float]:
    """Mean SSIM of images [n, 3, h, w] to their examples' positives, and to their negatives."""
    positives = torch.stack([example.positive for example in examples])
    found = similarities(images, positives, [example.negatives for example in examples])
    return float(found.positive.mean()), float(found.mean_over_negatives(found.negative).mean())
