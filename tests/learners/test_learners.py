import json

import pytest
import torch

from tasks.classification.backbone import CheckpointError
from tasks.classification.prototypes import cosine_logits, prototypes
from tasks.learners.base import TrainingData
from tasks.learners.factory import make_learner
from tasks.learners.finetune_proto import FinetuneProtoSettings, balanced
from tasks.learners.ncm import NcmSettings
from tests.tiny_vit import bars, save_tiny_vit, training

KINDS = ["finetune_proto", "ncm"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone_settings(tmp_path_factory):
    return save_tiny_vit(tmp_path_factory.mktemp("vit"))


def settings(kind, backbone, **changes):
    common = {"kind": kind, "backbone": backbone, "temperature": 16.0, "generated_weight": 0.5}
    if kind == "ncm":
        return NcmSettings.model_validate(common | changes)
    own = {"old_prototypes": "drift", "base": training(passes=8), "incremental": training()}
    return FinetuneProtoSettings.model_validate(common | own | changes)


@pytest.fixture
def make(backbone_settings):
    def build(kind, n_classes=5, **changes):
        return make_learner(settings(kind, backbone_settings, **changes), n_classes, CPU)

    return build


def data(per_class, classes, seed, generated=False):
    images, labels = bars(per_class, 5, seed)
    keep = torch.isin(labels, torch.tensor(classes))
    return TrainingData(images[keep], labels[keep], torch.full((int(keep.sum()),), generated))


def joined(*parts):
    return TrainingData(
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("images", "labels", "is_generated"))
    )


def after_base(learner, seed=0):
    learner.begin_session((0, 1, 2), (0, 1, 2))
    learner.learn(data(8, (0, 1, 2), seed=1), seed=seed)
    return learner


def accuracy(learner, classes, seen):
    held_out = data(10, classes, seed=99)
    return float((learner.predict(held_out.images, seen).argmax(1) == held_out.labels).float().mean())


# ------------------------------------------------------------------------------ all learners


@pytest.mark.parametrize("kind", KINDS)
def test_learns_two_sessions(make, kind):
    learner = after_base(make(kind))
    assert accuracy(learner, (0, 1, 2), (0, 1, 2)) > 0.6
    learner.begin_session((3, 4), (0, 1, 2, 3, 4))
    learner.learn(joined(data(5, (3, 4), 2), data(5, (0, 1, 2), 3, generated=True)), seed=1)
    assert accuracy(learner, (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)) > 0.4
    assert learner.memory == "prototypes"


@pytest.mark.parametrize("kind", KINDS)
def test_unseen_classes_are_never_predicted(make, kind):
    learner = after_base(make(kind))
    logits = learner.predict(torch.rand(6, 3, 16, 16), (0, 2))
    assert logits.shape == (6, 5)
    assert torch.isneginf(logits[:, [1, 3, 4]]).all()
    assert torch.isfinite(logits[:, [0, 2]]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_gives_one_checkpoint(make, kind, tmp_path):
    for name in ("a", "b"):
        after_base(make(kind)).save(tmp_path / name)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["learner.json", "weights.safetensors"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_reloaded_learner_predicts_and_continues_alike(make, kind, tmp_path):
    learner = after_base(make(kind))
    learner.save(tmp_path / "base")
    twin = make(kind)
    twin.load(tmp_path / "base")
    images = torch.rand(7, 3, 16, 16)
    assert torch.equal(learner.predict(images, (0, 1, 2)), twin.predict(images, (0, 1, 2)))
    for each, name in ((learner, "x"), (twin, "y")):
        for epoch in range(2):
            each.begin_session((3, 4), (0, 1, 2, 3, 4))
            each.learn(data(3, (3, 4), 2), seed=epoch)
        each.save(tmp_path / name)
    assert all((tmp_path / "x" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "y").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_epoch_needs_no_second_begin(make, kind, tmp_path):
    begun, loaded = after_base(make(kind)), make(kind)
    begun.save(tmp_path / "epoch")
    loaded.load(tmp_path / "epoch")
    begun.begin_session((0, 1, 2), (0, 1, 2))
    for learner, name in ((begun, "x"), (loaded, "y")):
        learner.learn(data(8, (0, 1, 2), 5), seed=9)
        learner.save(tmp_path / name)
    assert all((tmp_path / "x" / p.name).read_bytes() == p.read_bytes() for p in (tmp_path / "y").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_shots_are_predicted_without_themselves(make, kind):
    learner = after_base(make(kind))
    learner.begin_session((3, 4), (0, 1, 2, 3, 4))
    shots = joined(data(3, (3, 4), 2), data(2, (0, 3, 4), 7, generated=True))
    learner.learn(shots, seed=0)
    found = learner.predict_shots(shots, (0, 1, 2, 3, 4))
    assert found.shape == (6, 5)
    rest = shots.of(torch.arange(len(shots)) != 0)
    own = int(shots.labels[0])
    rows = prototypes(learner.features(rest.images), rest.labels, rest.is_generated, 5, 0.5)
    expected = cosine_logits(learner.features(shots.images[:1]), rows, 16.0)
    assert torch.allclose(found[0, own], expected[0, own], atol=1e-4)
    with_itself = learner.predict(shots.images[:1], (0, 1, 2, 3, 4))
    others = [c for c in range(5) if c != own]
    assert found[0, own] < with_itself[0, own]
    assert torch.allclose(found[0, others], with_itself[0, others], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_no_picture_is_kept(make, kind, tmp_path):
    """A checkpoint is as large after a hundred pictures as after ten: nothing of them is in it."""
    for count, name in ((2, "few"), (30, "many")):
        learner = make(kind)
        learner.begin_session((0, 1, 2), (0, 1, 2))
        learner.learn(data(count, (0, 1, 2), 1), seed=0)
        learner.save(tmp_path / name)
    for path in (tmp_path / "few").iterdir():
        assert path.stat().st_size == (tmp_path / "many" / path.name).stat().st_size


@pytest.mark.parametrize("kind", KINDS)
def test_nonsense_is_refused(make, kind):
    learner = make(kind)
    base = data(4, (0, 1, 2), 1)
    with pytest.raises(ValueError, match="no session has begun"):
        learner.learn(base, seed=0)
    with pytest.raises(ValueError, match="class 5 is out of range"):
        learner.begin_session((5,), (0, 5))
    with pytest.raises(ValueError, match="class 3 is new but not among"):
        learner.begin_session((3,), (0, 1))
    learner.begin_session((0, 1), (0, 1))
    with pytest.raises(ValueError, match="label 2 is not among the classes seen"):
        learner.learn(base, seed=0)
    learner.begin_session((0, 1, 2, 3), (0, 1, 2, 3))
    with pytest.raises(ValueError, match="class 3 is new but has no picture"):
        learner.learn(base, seed=0)
    with pytest.raises(ValueError, match="class 0 has not been learned yet"):
        learner.predict(base.images, (0, 1))


# ------------------------------------------------------------------------------ checkpoints refused


def test_a_checkpoint_of_another_learner_is_refused(make, tmp_path):
    after_base(make("ncm")).save(tmp_path)
    with pytest.raises(
        CheckpointError, match="written with kind='ncm', but this learner has kind='finetune_proto'"
    ):
        make("finetune_proto").load(tmp_path)
    with pytest.raises(CheckpointError, match="n_classes=5, but this learner has n_classes=6"):
        make("ncm", n_classes=6).load(tmp_path)


def test_missing_and_damaged_checkpoints_are_refused(make, tmp_path):
    learner = after_base(make("finetune_proto"))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        learner.load(tmp_path)
    learner.save(tmp_path)
    whole = (tmp_path / "weights.safetensors").read_bytes()
    for damage in (whole[: len(whole) // 2], b""):
        (tmp_path / "weights.safetensors").write_bytes(damage)
        with pytest.raises(CheckpointError, match="cannot be read"):
            learner.load(tmp_path)
    (tmp_path / "learner.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        learner.load(tmp_path)


def test_checkpoint_of_another_width_is_refused(make, tmp_path):
    learner = after_base(make("ncm"))
    learner.save(tmp_path)
    learner.rows = torch.zeros(5, 7)
    with pytest.raises(CheckpointError, match="do not fit"):
        learner.load(tmp_path)


def test_state_is_plain_json(make, tmp_path):
    after_base(make("ncm")).save(tmp_path)
    state = json.loads((tmp_path / "learner.json").read_text())
    assert state == {
        "format": 1,
        "kind": "ncm",
        "known": [0, 1, 2],
        "n_classes": 5,
        "new": [0, 1, 2],
        "seen": [0, 1, 2],
    }


# ------------------------------------------------------------------------------ nearest class mean


def test_ncm_trains_nothing_and_keeps_old_prototypes(make):
    learner = make("ncm")
    weights = [p.clone() for p in learner.backbone.parameters()]
    after_base(learner)
    old = learner.rows[:3].clone()
    learner.begin_session((3,), (0, 1, 2, 3))
    assert learner.learn(joined(data(3, (3,), 2), data(3, (0, 1), 3, generated=True)), seed=0) == []
    assert torch.equal(learner.rows[:3], old)
    assert all(torch.equal(a, b) for a, b in zip(weights, learner.backbone.parameters(), strict=True))


# ------------------------------------------------------------------------------ fine-tuning


def test_head_starts_at_the_class_means(make):
    learner = make("finetune_proto", base=training(passes=0))
    base = data(4, (0, 1, 2), 1)
    features = learner.features(base.images)
    learner.begin_session((0, 1, 2), (0, 1, 2))
    learner.learn(base, seed=0)
    assert torch.equal(learner.head_rows, prototypes(features, base.labels, base.is_generated, 5, 0.5))
    assert torch.equal(learner.head_rows, learner.rows)


def test_head_restarts_at_the_prototypes_once_a_session(make):
    learner = after_base(make("finetune_proto", incremental=training(passes=0)))
    assert not torch.equal(learner.head_rows[:3], learner.rows[:3])
    shots = data(3, (3, 4), 2)
    for _ in range(2):
        learner.begin_session((3, 4), (0, 1, 2, 3, 4))
        learner.learn(shots, seed=0)
        assert torch.equal(learner.head_rows, learner.rows)
        learner.head_rows[0] = learner.rows[0] = 7.0


def test_old_classes_without_pictures_keep_their_prototypes(make):
    learner = after_base(make("finetune_proto"))
    old = learner.rows[:3].clone()
    learner.begin_session((3, 4), (0, 1, 2, 3, 4))
    learner.learn(joined(data(3, (3, 4), 2), data(3, (1,), 3, generated=True)), seed=0)
    assert torch.equal(learner.rows[[0, 2]], old[[0, 2]])
    assert not torch.equal(learner.rows[1], old[1])


def test_without_drift_replay_leaves_old_prototypes(make):
    """With a frozen backbone nothing moves, so ``drift`` moves nothing; ``generated`` replaces."""
    replay = data(3, (0, 1), 3, generated=True)
    moved = {}
    for rule in ("drift", "generated", "keep"):
        learner = after_base(
            make("finetune_proto", old_prototypes=rule, incremental=training(freeze="backbone"))
        )
        old = learner.rows[:3].clone()
        learner.begin_session((3, 4), (0, 1, 2, 3, 4))
        learner.learn(joined(data(3, (3, 4), 2), replay), seed=0)
        moved[rule] = (learner.rows[:3] - old).abs().max()
    assert moved["drift"] < 1e-6
    assert moved["keep"] == 0
    assert moved["generated"] > 1e-3


def test_every_class_weighs_the_same():
    labels = torch.tensor([0, 0, 0, 2])
    weights = balanced(labels)
    assert torch.allclose(weights, torch.tensor([2 / 3, 2 / 3, 2 / 3, 2.0]))


# ------------------------------------------------------------------------------ training data


@pytest.mark.parametrize(
    ("images", "labels", "generated", "message"),
    [
        (
            torch.zeros(2, 1, 8, 8),
            torch.zeros(2).long(),
            torch.zeros(2).bool(),
            r"images must be float \[n, 3",
        ),
        (
            torch.zeros(2, 3, 8, 8).byte(),
            torch.zeros(2).long(),
            torch.zeros(2).bool(),
            "images must be float",
        ),
        (
            torch.zeros(2, 3, 8, 8),
            torch.zeros(3).long(),
            torch.zeros(2).bool(),
            r"labels must be int64 \[2\]",
        ),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2).bool(), "labels must be int64"),
        (torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), torch.zeros(2), "is_generated must be bool"),
    ],
)
def test_training_data_checks_itself(images, labels, generated, message):
    with pytest.raises(ValueError, match=message):
        TrainingData(images, labels, generated)
