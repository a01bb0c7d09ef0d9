"""Whatever a folder holds, a split either says what is wrong with it or keeps what Table 2 and FSCIL ask for."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.augmentation import AugmenterSettings, first_slots, next_slots
from tasks.datasets.pictures import Picture, cut_class
from tasks.datasets.settings import DatasetError, DatasetSettings
from tasks.records import AugmentedImage, Digest, ImageRef, Session, Verdict

SETTINGS = DatasetSettings(
    name="n", root=".", n_base=2, n_way=1, k_shot=2, n_sessions=1, base_shots=None, test_per_class=None, holdout=0.1,
    class_order=None, class_names=None, size=8, split_seed=0,
)  # fmt: skip


def pictures(kind: str, count: int) -> list[Picture]:
    return [Picture(f"{kind}-{n}", f"{kind}/{n}.png") for n in range(count)]


@given(
    label=st.integers(0, 2),
    train=st.integers(0, 12),
    val=st.none() | st.integers(0, 4),
    test=st.integers(0, 5),
    shots=st.none() | st.integers(1, 8),
    k_shot=st.integers(1, 5),
    tests=st.none() | st.integers(1, 4),
    holdout=st.floats(0.01, 0.99),
)
def test_a_class_is_shared_out_or_refused_and_no_picture_has_two_roles(
    label: int,
    train: int,
    val: int | None,
    test: int,
    shots: int | None,
    k_shot: int,
    tests: int | None,
    holdout: float,
) -> None:
    changes = {"base_shots": shots, "k_shot": k_shot, "test_per_class": tests, "holdout": holdout}
    settings = DatasetSettings(**{**SETTINGS.model_dump(exclude_unset=True), **changes})
    pool, held, tested = pictures("train", train), pictures("val", val or 0), pictures("test", test)
    is_base = label < settings.n_base
    try:
        draw = cut_class(settings, label, "zero", pool, None if val is None else held, tested)
    except DatasetError:
        least = 2 if is_base and val is None else 1
        wanted = (shots or least) if is_base else k_shot
        assert train < max(wanted, least) or wanted < least or (is_base and val == 0) or test < (tests or 1)
        return
    assert len(draw.train) >= 1
    assert len(draw.test) == (tests or test) >= 1
    assert (len(draw.val) >= 1) == is_base
    assert not set(draw.train) & set(draw.val)
    drawn = set(draw.train) | (set(draw.val) if val is None else set())
    assert len(drawn) == ((shots or train) if is_base else k_shot)
    assert drawn <= set(pool)
    assert all(list(role) == sorted(role) for role in draw)


def refs(label: int, count: int, role: str) -> tuple[ImageRef, ...]:
    names = [f"{role}-{label}-{n}" for n in range(count)]
    return tuple(ImageRef(id=name, path=f"{name}.png", digest=Digest(name), label=label) for name in names)


@given(
    data=st.data(),
    key=st.sampled_from(["id", "path", "digest"]),
    roles=st.sampled_from([("train", "val"), ("train", "test"), ("val", "test")]),
    published=st.booleans(),
)
def test_a_session_refuses_a_picture_in_two_roles_by_id_place_and_content(
    data: st.DataObject, key: str, roles: tuple[str, str], published: bool
) -> None:
    sizes = {role: data.draw(st.integers(1, 4), label=role) for role in ("train", "val", "test")}
    images = {role: refs(0, size, role) for role, size in sizes.items()}
    fixed = {
        "index": 0,
        "new_classes": (0,),
        "seen_classes": (0,),
        "val_rule": "holdout",
        "published": published,
    }
    Session(**fixed, **images)
    first, second = roles
    at = data.draw(st.integers(0, sizes[second] - 1))
    twin = images[second][at].model_copy(update={key: getattr(images[first][0], key)})
    images[second] = (*images[second][:at], twin, *images[second][at + 1 :])
    if published and roles == ("train", "test") and key == "digest":
        Session(**fixed, **images)
        return
    with pytest.raises(ValueError, match=f"same {key}"):
        Session(**fixed, **images)


# ---------------------------------------------------------------------------------------- slots

NAMES = ("ant", "bee", "cat dog", "é")


def augmenter(per_original: int, least: int, old: int, first: str) -> AugmenterSettings:
    return AugmenterSettings(
        source="generator", prompts="rewritten", tuning="guided", base_prompt="A picture of a {category}",
        first_prompts=first, images_per_original=per_original, min_per_class=least, old_classes=old,
    )  # fmt: skip


def drawn(slots: Sequence, epoch: int) -> list[AugmentedImage]:
    return [
        AugmentedImage(
            id=f"e{epoch}-{slot.id}",
            slot=slot.id,
            source_id=slot.source_id,
            label=slot.label,
            prompt=slot.prompt,
            seed=0,
            path=f"{slot.id}.png",
            digest=Digest(slot.id),
            parent_id=slot.parent_id,
        )
        for slot in slots
    ]


@given(
    shots=st.lists(st.integers(1, 4), min_size=2, max_size=2),
    per_original=st.integers(1, 3),
    least=st.integers(0, 6),
    old=st.integers(0, 5),
    first=st.sampled_from(["base", "learned"]),
    rewritten=st.lists(st.text(min_size=1, max_size=30), max_size=6),
)
def test_a_set_has_its_budget_of_slots_and_each_slot_its_own_prompt_through_the_epochs(
    shots: list[int], per_original: int, least: int, old: int, first: str, rewritten: list[str]
) -> None:
    settings = augmenter(per_original, least, old, first)
    base = Session(
        index=0, new_classes=(0, 1), seen_classes=(0, 1), train=refs(0, shots[0], "t") + refs(1, shots[1], "t"),
        val=(), test=(), val_rule="leave_one_out",
    )  # fmt: skip
    slots = first_slots(base, NAMES, settings, [])
    assert len({slot.id for slot in slots}) == len(slots)
    counts = [sum(slot.label == label for slot in slots) for label in (0, 1)]
    assert counts == [max(n * per_original, least) for n in shots]
    images = drawn(slots, 0)
    verdicts = {
        image.id: Verdict(
            augmented_id=image.id, label=image.label, level="semantic", prompt_next=prompt, comparisons=()
        )
        for image, prompt in zip(images, rewritten, strict=False)
    }
    after = next_slots(images, verdicts)
    assert [slot.id for slot in after] == [slot.id for slot in slots]
    assert [slot.parent_id for slot in after] == [image.id for image in images]
    assert [s.prompt for s in after] == [
        verdicts[i.id].prompt_next if i.id in verdicts else i.prompt for i in images
    ]
    later = Session(
        index=1, new_classes=(2,), seen_classes=(0, 1, 2), train=refs(2, 3, "t"), val=(), test=(),
        val_rule="leave_one_out",
    )  # fmt: skip
    replayed = first_slots(later, NAMES, settings, drawn(after, 1))
    assert [sum(slot.label == label for slot in replayed) for label in (0, 1)] == [old, old]
    assert all(slot.source_id is None for slot in replayed if slot.label != 2)
    assert all(slot.prompt for slot in replayed)
