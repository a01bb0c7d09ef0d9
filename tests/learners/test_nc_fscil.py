import pytest
import torch

from tasks.learners.base import TrainingData
from tasks.learners.nc_fscil import (
    NcFscil,
    NcFscilSettings,
    NeckSettings,
    dot_regression,
    equiangular_frame,
    places,
    shares,
)
from tasks.learners.sessions import seeded
from tests.learners.given import base_data, pictures, recipe, session_data
from tests.tiny_vit import save_tiny_vit

ALL = (0, 1, 2, 3, 4)


def make(folder, n_classes=5, **changes):
    values = {
        "kind": "nc_fscil",
        "backbone": save_tiny_vit(folder),
        "generated_weight": 0.5,
        "etf_classes": None,
        "width": 12,
        "loss_scale": 10.0,
        "base": recipe(),
        "incremental": NeckSettings(
            steps=60, optimizer="adam", momentum=0.0, weight_decay=0.0, learning_rate=1e-2, old_weight=5.0
        ),
    }
    return NcFscil(NcFscilSettings.model_validate(values | changes), n_classes, torch.device("cpu"))


def after_base(learner):
    learner.begin_session((0, 1, 2), (0, 1, 2))
    learner.learn(base_data(), seed=0)
    return learner


def joined(*parts):
    return TrainingData(
        *(torch.cat([getattr(p, name) for p in parts]) for name in ("images", "labels", "is_generated"))
    )


# ---------------------------------------------------------------------- the frame and the loss


@pytest.mark.parametrize(("width", "columns"), [(5, 5), (32, 10), (256, 100)])
def test_columns_have_unit_norms_and_equal_angles(width, columns):
    with seeded(4):
        frame = equiangular_frame(width, columns)
    cosines = frame.T @ frame
    expected = torch.full((columns, columns), -1 / (columns - 1)).fill_diagonal_(1.0)
    assert torch.allclose(cosines, expected, atol=1e-5)


def test_the_loss_is_zero_on_the_column_and_pulls_towards_it():
    with seeded(0):
        frame = equiangular_frame(8, 4)
    labels = torch.arange(4)
    assert torch.allclose(dot_regression(frame.T @ frame, labels, 10.0), torch.zeros(4), atol=1e-10)
    wrong = dot_regression((frame.T @ frame).roll(1, 1), labels, 10.0)
    assert torch.allclose(wrong, torch.full((4,), 10 / 2 * (1 + 1 / 3) ** 2))
    feature = torch.randn(1, 8, requires_grad=True)
    dot_regression(feature @ frame, torch.tensor([2]), 10.0).sum().backward()
    pull = -feature.grad[0] / feature.grad.norm()
    assert torch.allclose(
        pull.abs(), frame[:, 2].abs(), atol=1e-5
    )  # along the column, and along nothing else


def test_a_frame_too_small_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 4 columns, but the dataset has 5 classes; set"):
        make(tmp_path, etf_classes=4)
    with pytest.raises(ValueError, match="at least as wide, not 12; set"):
        make(tmp_path, etf_classes=13)
    assert make(tmp_path, etf_classes=9).head.frame.shape == (12, 9)


# ---------------------------------------------------------------------- training


def test_base_trains_backbone_and_neck_later_sessions_the_neck_alone_and_none_the_frame(tmp_path):
    learner = make(tmp_path)
    frozen = [p.detach().clone() for p in learner.backbone.parameters()]
    after_base(learner)
    frame = learner.head.frame.clone()
    tuned = [p.detach().clone() for p in learner.backbone.parameters()]
    neck = [p.detach().clone() for p in learner.head.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(frozen, tuned, strict=True))
    learner.begin_session((3, 4), ALL)
    learner.learn(session_data(), seed=0)
    assert all(torch.equal(a, b) for a, b in zip(tuned, learner.backbone.parameters(), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(neck, learner.head.parameters(), strict=True))
    assert torch.equal(learner.head.frame, frame)


def test_memory_is_the_mean_feature_of_each_class(tmp_path):
    learner, data = make(tmp_path), base_data()
    after_base(learner)
    features = learner.features(data.images)
    for c in range(3):
        assert torch.allclose(learner.means[c], features[data.labels == c].mean(0), atol=1e-5)
    old = learner.means[:3].clone()
    learner.begin_session((3, 4), ALL)
    learner.learn(session_data(), seed=0)
    assert torch.equal(learner.means[:3], old)


def test_a_session_learns_its_shots_and_holds_the_means(tmp_path):
    learner = after_base(make(tmp_path))
    learner.begin_session((3, 4), ALL)
    shots = session_data()
    learner.learn(shots, seed=0)
    assert torch.equal(learner.predict(shots.images, ALL).argmax(1), shots.labels)
    assert torch.equal(learner._cosines(learner.head, learner.means).argmax(1), torch.arange(5))


def test_an_epoch_starts_where_the_session_began(tmp_path):
    learner = after_base(make(tmp_path))
    learner.begin_session((3, 4), ALL)
    learner.learn(session_data(), seed=0)
    first = learner.head.neck.skip.weight.clone()
    learner.learn(joined(session_data(), pictures(2, (3, 4), 9, generated=True)), seed=1)
    assert not torch.equal(learner.head.neck.skip.weight, first)
    learner.learn(session_data(), seed=2)
    assert torch.equal(learner.head.neck.skip.weight, first)


def test_generated_pictures_of_old_classes_change_nothing(tmp_path):
    learner = after_base(make(tmp_path))
    learner.begin_session((3, 4), ALL)
    learner.learn(session_data(), seed=0)
    alone = learner.head.neck.skip.weight.clone()
    learner.learn(joined(session_data(), pictures(2, (0, 1), 9, generated=True)), seed=0)
    assert torch.allclose(learner.head.neck.skip.weight, alone, atol=1e-3)


# ---------------------------------------------------------------------- left-out shots, weights


def test_a_left_out_shot_is_predicted_by_a_neck_that_never_saw_it(tmp_path):
    learner = after_base(make(tmp_path))
    learner.begin_session((3, 4), ALL)
    shots = session_data()
    learner.learn(shots, seed=0)
    found = learner.predict_shots(shots, ALL)
    learner.learn(shots.of(torch.tensor([0, 2, 3, 5])), seed=0)  # the second of both classes left out
    assert torch.allclose(found[[1, 4]], learner.predict(shots.images[[1, 4]], ALL), atol=1e-4)


def test_places_count_within_a_class():
    counted = torch.tensor([True, True, False, True, True, True])
    assert places(torch.tensor([3, 4, 3, 3, 4, 3]), counted)[counted].tolist() == [0, 0, 1, 1, 2]


def test_generated_pictures_take_their_share_of_a_class():
    labels = torch.tensor([0, 0, 0, 0, 1, 2])
    generated = torch.tensor([False, False, True, True, False, True])
    weights = shares(labels, generated, 0.25)
    assert weights.tolist() == [0.75, 0.75, 0.25, 0.25, 1.0, 1.0]
