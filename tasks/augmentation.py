"""Slots: which images an epoch's augmentation set draws, for what, and from which prompt.

A slot is one place in the set. It doubles one training image (the paper draws as many images as the
training set has, every epoch) or replays an earlier class without storing any of its images, and it
carries its own prompt through the epochs, so that Eq. 1 can rewrite each prompt by itself.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.records import AugmentedImage, Frozen, Session, Verdict


class AugmenterSettings(Frozen):
    """augmenter = source x prompts x tuning; the rows of Tables 3 and 4 are presets of these three.

    Raises:
        ValueError: rewriting or tuning is asked for without a generator, or the prompt names no category.
    """

    source: Literal["none", "generator", "images_api"]
    prompts: Literal["fixed", "rewritten"]
    tuning: Literal["none", "random", "first", "guided"]
    base_prompt: str
    first_prompts: Literal["base", "learned"]
    images_per_original: int = Field(ge=1)
    min_per_class: int = Field(ge=0)
    old_classes: int = Field(ge=0)

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if "{category}" not in self.base_prompt:
            raise ValueError(f"augmenter.base_prompt {self.base_prompt!r} must contain {{category}}")
        try:
            self.base_prompt.format(category="")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(
                f"augmenter.base_prompt {self.base_prompt!r} may hold {{category}} and no other brace"
            ) from error
        if self.source == "none" and (self.prompts != "fixed" or self.tuning != "none"):
            raise ValueError(
                "augmenter.source=none draws no images: use prompts=fixed and tuning=none with it"
            )
        if self.source == "images_api" and (self.prompts != "fixed" or self.tuning != "none"):
            raise ValueError(
                "augmenter.source=images_api draws with a provider's model, which cannot learn from failures: "
                "use prompts=fixed and tuning=none with it"
            )
        return self

    @property
    def draws(self) -> bool:
        """Whether any image is generated."""
        return self.source != "none"

    @property
    def learns(self) -> bool:
        """Whether failures change the next epoch's set, by prompt or by weights."""
        return self.prompts == "rewritten" or self.tuning != "none"

    @property
    def asks_vlm(self) -> bool:
        """Whether a verdict is needed: to rewrite prompts, or to choose the half of the steps to tune."""
        return self.prompts == "rewritten" or self.tuning == "guided"


class Slot(Frozen):
    """One place of an augmentation set, before its image is drawn."""

    id: str
    source_id: str | None
    label: int
    prompt: str
    parent_id: str | None


def first_slots(
    session: Session,
    class_names: Sequence[str],
    settings: AugmenterSettings,
    earlier: Sequence[AugmentedImage],
) -> list[Slot]:
    """The slots of A_0: the first prompt for every new class, the last prompts again for earlier ones.

    With ``first_prompts=base`` a new class starts from the paper's fixed prompt. With ``learned`` it starts from what
    the earlier classes' prompts have become, its own category's word in the place of theirs; and so does an earlier
    class that never failed, whose prompt nobody had cause to rewrite.

    Args:
        session: the session that begins.
        class_names: the category word of each label.
        settings: how many images, and the base prompt.
        earlier: the set that the session before ended with; its prompts were learned there.
    """
    return [
        *_new_class_slots(session, class_names, settings, earlier),
        *_replay_slots(session, class_names, settings, earlier),
    ]


def _new_class_slots(
    session: Session,
    class_names: Sequence[str],
    settings: AugmenterSettings,
    earlier: Sequence[AugmentedImage],
) -> list[Slot]:
    sources: dict[int, list[str]] = defaultdict(list)
    for image in session.train:
        sources[image.label].append(image.id)
    slots = []
    for label in session.new_classes:
        ids = sources[label]
        count = max(len(ids) * settings.images_per_original, settings.min_per_class)
        base = settings.base_prompt.format(category=class_names[label])
        prompts = _spread(_learned(label, class_names, settings, earlier) or [base], count)
        slots += [
            Slot(
                id=f"{label:03d}-{n:04d}",
                source_id=ids[n % len(ids)],
                label=label,
                prompt=prompt,
                parent_id=None,
            )
            for n, prompt in enumerate(prompts)
        ]
    return slots


def _learned(
    label: int, class_names: Sequence[str], settings: AugmenterSettings, earlier: Sequence[AugmentedImage]
) -> list[str]:
    """The rewritten prompts of all earlier classes, as often as they stand there, about another category.

    Empty with ``base``, or where no prompt was rewritten. A prompt that is still the first one has taught nothing.
    """
    if settings.first_prompts == "base":
        return []
    names = [class_names[image.label] for image in earlier]
    first = [settings.base_prompt.format(category=name) for name in names]
    rewritten = [
        image.prompt.partition(name)
        for image, name, base in zip(earlier, names, first, strict=True)
        if image.prompt != base
    ]
    return [f"{before}{class_names[label]}{after}" for before, word, after in rewritten if word]


def _replay_slots(
    session: Session,
    class_names: Sequence[str],
    settings: AugmenterSettings,
    earlier: Sequence[AugmentedImage],
) -> list[Slot]:
    known: dict[int, list[AugmentedImage]] = defaultdict(list)
    for image in earlier:
        known[image.label].append(image)
    slots = []
    for label in sorted(set(session.seen_classes) - set(session.new_classes)):
        base = settings.base_prompt.format(category=class_names[label])
        prompts = [image.prompt for image in known[label]]
        if set(prompts) <= {base}:
            prompts = _learned(label, class_names, settings, earlier) or [base]
        prompts = _spread(prompts, settings.old_classes)
        slots += [
            Slot(id=f"{label:03d}-{n:04d}", source_id=None, label=label, prompt=prompt, parent_id=None)
            for n, prompt in enumerate(prompts)
        ]
    return slots


def _spread(prompts: Sequence[str], count: int) -> list[str]:
    """``count`` prompts taken evenly from the list, so that its proportions are kept."""
    return [
        prompts[(n * len(prompts)) // count] if count <= len(prompts) else prompts[n % len(prompts)]
        for n in range(count)
    ]


def next_slots(images: Sequence[AugmentedImage], verdicts: Mapping[str, Verdict]) -> list[Slot]:
    """The slots of A_{k+1}: those of A_k, each with the prompt its verdict gave it (Eq. 1).

    Args:
        images: A_k.
        verdicts: by augmented image id; a slot without one keeps its prompt.
    """
    return [
        Slot(
            id=image.slot,
            source_id=image.source_id,
            label=image.label,
            prompt=verdicts[image.id].prompt_next if image.id in verdicts else image.prompt,
            parent_id=image.id,
        )
        for image in images
    ]


def image_id(session: int, epoch: int, slot: str) -> str:
    """The id of the image that a slot draws in one epoch."""
    return f"s{session:02d}-e{epoch:03d}-{slot}"
