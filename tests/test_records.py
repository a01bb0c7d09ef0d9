"""Records refuse what cannot be: overlapping splits, unknown keys, changes; accuracies are functions of counts."""

import pytest
from pydantic import ValidationError

from tasks.records import (
    ArtifactRef,
    AugmentedImage,
    ClassCount,
    Digest,
    ExperimentRecord,
    ImageRef,
    Prediction,
    Session,
    SessionAccuracy,
    Usage,
)


def image(name: str, **changes: object) -> ImageRef:
    return ImageRef(**{"id": name, "path": f"{name}.png", "digest": Digest(name), "label": 0, **changes})


def session(train: list[ImageRef], val: list[ImageRef], test: list[ImageRef]) -> Session:
    return Session(
        index=0,
        new_classes=(0,),
        seen_classes=(0,),
        train=tuple(train),
        val=tuple(val),
        test=tuple(test),
        val_rule="holdout",
    )


@pytest.mark.parametrize(
    ("train", "val", "test", "says"),
    [
        (["a"], ["a"], [], "val image 'a.png' is also in train"),
        (["a"], [], ["a"], "test image 'a.png' is also in train"),
        ([], ["b"], ["b"], "test image 'b.png' is also in val"),
    ],
)
def test_overlap_is_refused(train: list[str], val: list[str], test: list[str], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        session([image(n) for n in train], [image(n) for n in val], [image(n) for n in test])


@pytest.mark.parametrize("same", ["id", "path", "digest"])
def test_the_same_picture_under_another_name_is_overlap(same: str) -> None:
    with pytest.raises(ValidationError, match=f"same {same}"):
        session([image("a")], [], [image("b", **{same: getattr(image("a"), same)})])


def test_published_lists_may_hold_one_picture_in_train_and_test_but_not_in_val() -> None:
    held, twin = image("b"), image("c", digest=Digest("a"))
    lists = Session(**(dict(session([image("a")], [held], [])) | {"test": (twin,), "published": True}))
    assert lists.model_dump()["published"] is True
    assert "published" not in session([image("a")], [held], []).model_dump()
    with pytest.raises(
        ValidationError, match=r"test image 'c\.png' is also in val as 'b\.png' \(same digest\)"
    ):
        Session(**(dict(lists) | {"val": (image("b", digest=Digest("a")),), "train": ()}))


def test_leave_one_out_validates_on_the_shots_and_holdout_on_what_was_held_out() -> None:
    held_out = session([image("a")], [image("b")], [])
    assert [i.id for i in held_out.validation] == ["b"]
    shots = held_out.model_copy(update={"val": (), "val_rule": "leave_one_out"})
    assert [i.id for i in shots.validation] == ["a"]


def test_records_are_frozen_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        image("a").label = 3
    with pytest.raises(ValidationError, match="Extra inputs"):
        image("a", colour="red")


def test_accuracy_is_micro_and_novel_classes_stand_apart() -> None:
    counts = (
        ClassCount(label=0, correct=9, total=10),
        ClassCount(label=1, correct=6, total=10),
        ClassCount(label=2, correct=1, total=5),
    )
    accuracy = SessionAccuracy(session=1, n_base=2, counts=counts)
    assert accuracy.overall == pytest.approx(16 / 25)
    assert accuracy.base == pytest.approx(15 / 20)
    assert accuracy.novel == pytest.approx(1 / 5)
    assert accuracy.harmonic == pytest.approx(2 * 0.75 * 0.2 / 0.95)
    base_only = SessionAccuracy(session=0, n_base=2, counts=counts[:2])
    assert (base_only.novel, base_only.harmonic) == (None, None)
    nothing = SessionAccuracy(
        session=1,
        n_base=1,
        counts=(ClassCount(label=0, correct=0, total=3), ClassCount(label=1, correct=0, total=3)),
    )
    assert nothing.harmonic == 0


def test_counting_predictions() -> None:
    seen = [Prediction(image_id=str(n), label=n % 2, predicted=0, margin=1.0) for n in range(5)]
    assert SessionAccuracy.of(0, 2, seen).counts == (
        ClassCount(label=0, correct=3, total=3),
        ClassCount(label=1, correct=0, total=2),
    )


def test_experiment_figures() -> None:
    def session_of(index: int, correct: int) -> SessionAccuracy:
        return SessionAccuracy(
            session=index, n_base=1, counts=(ClassCount(label=0, correct=correct, total=10),)
        )

    record = ExperimentRecord(
        run="r",
        dataset="d",
        method="m",
        seed=0,
        class_names=("a",),
        n_base=1,
        images_drawn=0,
        usage=Usage(),
        epochs=3,
        sessions=(session_of(0, 9), session_of(1, 6), session_of(2, 3)),
    )
    assert (record.a_base, record.a_last, record.a_avg) == pytest.approx((0.9, 0.3, 0.6))
    assert record.pd == pytest.approx(0.6)


def test_an_artifact_knows_its_name_in_an_exported_folder() -> None:
    ref = ArtifactRef(path="regenerate/abc/images/x", digest=Digest("d"), kind="images")
    assert ref.name == "images/x"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stands_in_no_record_and_no_setting(value: float) -> None:
    with pytest.raises(ValueError, match="margin"):
        Prediction(image_id="a", label=0, predicted=1, margin=value)


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "a/b//etc/passwd",
        "../../../etc/passwd",
        "a/b/../../../x",
        "a/./b/c",
        "a/b/",
        "",
        "a/b",
        "a/b/c\0",
    ],
)
def test_a_reference_leads_nowhere_else(path: str) -> None:
    with pytest.raises(ValidationError, match="path"):
        ArtifactRef(path=path, digest=Digest("d"), kind="images")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.png", "a/../../x.png", "a//x.png", "."])
def test_an_image_of_a_record_lies_in_its_folder(path: str) -> None:
    with pytest.raises(ValidationError, match="stays inside"):
        ImageRef(id="i", path=path, digest=Digest("d"), label=0)
    with pytest.raises(ValidationError, match="stays inside"):
        AugmentedImage(
            id="i", slot="s", source_id=None, label=0, prompt="p", seed=0, path=path, digest=Digest("d"), parent_id=None
        )  # fmt: skip
    assert ImageRef(id="i", path="a b/ü..x.png", digest=Digest("d"), label=0).path == "a b/ü..x.png"
