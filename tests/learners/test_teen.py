import math

import pytest
import torch
from torch.nn.functional import normalize

from tasks.classification.prototypes import prototypes
from tasks.learners.teen import Teen, TeenSettings, calibrated
from tests.learners.given import base_data, recipe, session_data
from tests.tiny_vit import save_tiny_vit

SHARPNESS, OWN = 4.0, 0.25


@pytest.fixture
def learner(tmp_path):
    settings = TeenSettings(
        kind="teen",
        backbone=save_tiny_vit(tmp_path),
        temperature=16.0,
        generated_weight=0.5,
        base=recipe(passes=1),
        own_share=OWN,
        sharpness=SHARPNESS,
    )
    learner = Teen(settings, 5, torch.device("cpu"))
    learner.begin_session((0, 1, 2), (0, 1, 2))
    learner.learn(base_data(), seed=0)
    return learner


def test_a_case_worked_by_hand():
    """Two base classes on the axes, a new one at (0.6, 0.8): cosines 0.6 and 0.8, so their shares are
    1 / (1 + e^(0.2 tau)) and the rest; with tau = 5 ln 3 they are 1/4 and 3/4."""
    found = calibrated(torch.tensor([[0.6, 0.8]]), torch.eye(2), 0.5, 5 * math.log(3))
    assert torch.allclose(found, normalize(torch.tensor([[0.5 * 0.6 + 0.125, 0.5 * 0.8 + 0.375]]), dim=1))


def test_at_share_one_nothing_moves_and_without_sharpness_all_base_classes_pull_alike():
    rows, base = normalize(torch.randn(3, 6), dim=1), normalize(torch.randn(4, 6), dim=1)
    assert torch.allclose(calibrated(rows, base, 1.0, 16.0), rows, atol=1e-6)
    pulled = normalize(0.5 * rows + 0.5 * base.mean(0), dim=1)
    assert torch.allclose(calibrated(rows, base, 0.5, 0.0), pulled, atol=1e-6)


def test_new_rows_are_calibrated_by_the_base_rows_and_no_others(learner):
    base = learner.rows[:3].clone()
    for new, seen in (((3,), (0, 1, 2, 3)), ((4,), (0, 1, 2, 3, 4))):
        shots = session_data()
        shots = shots.of(shots.labels == new[0])
        learner.begin_session(new, seen)
        learner.learn(shots, seed=0)
        means = prototypes(learner.features(shots.images), shots.labels, shots.is_generated, 5, 0.5)
        assert torch.allclose(learner.rows[new[0]], calibrated(means[list(new)], base, OWN, SHARPNESS)[0])
    assert torch.equal(learner.rows[:3], base)


def test_a_left_out_shot_meets_the_calibrated_prototype_of_the_others(learner):
    shots = session_data()
    learner.begin_session((3, 4), (0, 1, 2, 3, 4))
    learner.learn(shots, seed=0)
    found = learner.predict_shots(shots, (0, 1, 2, 3, 4))
    others = normalize(learner.features(shots.images[1:3]), dim=1).mean(0, keepdim=True)
    row = calibrated(normalize(others, dim=1), learner.rows[:3], OWN, SHARPNESS)[0]
    own = normalize(learner.features(shots.images[:1]), dim=1)[0]
    assert math.isclose(float(found[0, 3]), 16.0 * float(own @ row), abs_tol=1e-4)
