import json
import math

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


# ------------------------------------------------------------------------------ both


@pytest.mark.parametrize("kind", KINDS)
def test_learns_two_sessions(make, kind):
    learner = after_base(make(kind))
    assert accuracy(learner, (0, 1, 2), (0, 1, 2)) > 0.6
    learner.begin_session((3, 4), (0, 1, 2, 3, 4))
    learner.learn(joined(data(5, (3, 4), 2), data(5, (0, 1, 2), 3, generated=True)), seed=1)
    assert accuracy(learner, (0, 1, 2, 3, 4), (0, 1, 2, 3, 4)) > 0.4
    assert learner.memory == "prototypes"


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


# ------------------------------------------------------------------------------ checkpoints refused


def test_weights_that_the_last_step_drove_off_are_not_saved(make, tmp_path):
    """Each loss is taken before its step: of the last step none tells."""
    learner = make("finetune_proto", base=training(passes=1, batch=1000, learning_rate=3e38))
    learner.begin_session((0, 1, 2), (0, 1, 2))
    assert all(map(math.isfinite, learner.learn(data(8, (0, 1, 2), seed=1), seed=0)))
    with pytest.raises(
        ValueError, match=r"training diverged: \w.* is no longer finite; lower the learning_rate"
    ):
        learner.save(tmp_path / "sealed")
    assert not (tmp_path / "sealed").exists()


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
            r"images must be uint8 or float \[n, 3",
        ),
        (
            torch.zeros(2, 3, 8, 8).short(),
            torch.zeros(2).long(),
            torch.zeros(2).bool(),
            "images must be uint8 or float",
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
