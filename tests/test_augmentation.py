"""Slots: one image per training image, prompts that are carried and rewritten one by one, data-free replay."""

import pytest

from tasks.augmentation import AugmenterSettings, first_slots, image_id, next_slots
from tasks.records import AugmentedImage, Digest, ImageRef, Session, Verdict


def settings(**changes: object) -> AugmenterSettings:
    values = {
        "source": "generator",
        "prompts": "rewritten",
        "tuning": "guided",
        "base_prompt": "A picture of a {category}",
        "first_prompts": "base",
        "images_per_original": 1,
        "min_per_class": 0,
        "old_classes": 4,
    }
    return AugmenterSettings(**{**values, **changes})


def image(label: int, n: int) -> ImageRef:
    return ImageRef(id=f"{label}/{n}", path=f"{label}/{n}.png", digest=Digest(f"{label}-{n}"), label=label)


def session(index: int, new: tuple[int, ...], seen: tuple[int, ...], shots: int) -> Session:
    train = tuple(image(label, n) for label in new for n in range(shots))
    return Session(
        index=index,
        new_classes=new,
        seen_classes=seen,
        train=train,
        val=(),
        test=(),
        val_rule="leave_one_out",
    )


def drawn(label: int, n: int, prompt: str, epoch: int = 2) -> AugmentedImage:
    slot = f"{label:03d}-{n:04d}"
    return AugmentedImage(
        id=image_id(0, epoch, slot), slot=slot, source_id=f"{label}/{n}", label=label, prompt=prompt, seed=1,
        path=f"x/{slot}.png", digest=Digest("d"), parent_id=None,
    )  # fmt: skip


NAMES = ("ant", "bee", "cat")


def test_one_image_per_training_image_from_the_first_prompt() -> None:
    slots = first_slots(session(0, (0, 1), (0, 1), 3), NAMES, settings(), [])
    assert [(s.label, s.source_id, s.prompt) for s in slots] == [
        (label, f"{label}/{n}", f"A picture of a {NAMES[label]}") for label in (0, 1) for n in range(3)
    ]


def test_few_shots_are_topped_up_evenly() -> None:
    slots = first_slots(session(0, (0,), (0,), 3), NAMES, settings(min_per_class=7), [])
    assert [s.source_id for s in slots] == ["0/0", "0/1", "0/2", "0/0", "0/1", "0/2", "0/0"]
    assert len({s.id for s in slots}) == 7


def test_old_classes_are_replayed_with_the_prompts_they_ended_with() -> None:
    earlier = [drawn(0, n, f"p{n // 2}") for n in range(8)]
    slots = first_slots(session(1, (2,), (0, 1, 2), 2), NAMES, settings(), earlier)
    old = [s for s in slots if s.source_id is None]
    assert [(s.label, s.prompt) for s in old] == [
        *[(0, f"p{n}") for n in range(4)],
        *[(1, "A picture of a bee")] * 4,
    ]
    assert {s.label for s in slots if s.source_id} == {2}


def test_more_replayed_images_than_prompts_cycle() -> None:
    slots = first_slots(
        session(1, (2,), (0, 2), 1), NAMES, settings(old_classes=3), [drawn(0, 0, "a"), drawn(0, 1, "b")]
    )
    assert [s.prompt for s in slots if s.label == 0] == ["a", "b", "a"]


def test_a_verdict_changes_only_its_own_slot_and_the_parent_is_named() -> None:
    images = [drawn(0, 0, "a"), drawn(0, 1, "a")]
    verdict = Verdict(augmented_id=images[1].id, label=0, level="semantic", prompt_next="b", comparisons=())
    slots = next_slots(images, {verdict.augmented_id: verdict})
    assert [(s.prompt, s.parent_id) for s in slots] == [("a", images[0].id), ("b", images[1].id)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"base_prompt": "A picture"}, "category"),
        ({"source": "none"}, "draws no images"),
        ({"images_per_original": 0}, "greater"),
    ],
)
def test_incoherent_settings_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        settings(**changes)


@pytest.mark.parametrize(
    ("prompts", "tuning", "asks", "learns"),
    [
        ("fixed", "none", False, False),
        ("rewritten", "none", True, True),
        ("fixed", "first", False, True),
        ("fixed", "guided", True, True),
    ],
)
def test_who_asks_the_vlm(prompts: str, tuning: str, asks: bool, learns: bool) -> None:
    chosen = settings(prompts=prompts, tuning=tuning)
    assert (chosen.asks_vlm, chosen.learns) == (asks, learns)


def test_a_new_class_may_start_from_what_earlier_prompts_have_become() -> None:
    earlier = [
        drawn(0, 0, "A picture of a ant, red"),
        drawn(1, 1, "A picture of a bee"),  # never rewritten: nothing learned
        drawn(1, 2, "an insect"),  # its class's word is gone
        drawn(1, 3, "a small bee"),
    ]
    chosen = settings(first_prompts="learned", min_per_class=4)
    slots = first_slots(session(1, (2,), (0, 1, 2), 1), NAMES, chosen, earlier)
    assert [s.prompt for s in slots if s.label == 2] == ["A picture of a cat, red", "a small cat"] * 2
    untaught = first_slots(session(1, (2,), (0, 1, 2), 1), NAMES, chosen, earlier[1:3])
    assert {s.prompt for s in untaught if s.label == 2} == {"A picture of a cat"}
    assert first_slots(session(0, (2,), (2,), 1), NAMES, chosen, [])[0].prompt == "A picture of a cat"
