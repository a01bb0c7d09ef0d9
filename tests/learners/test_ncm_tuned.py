import pytest
import torch

from tasks.classification.prototypes import prototypes
from tasks.learners.ncm_tuned import NcmTuned, NcmTunedSettings
from tests.learners.given import base_data, recipe, session_data
from tests.tiny_vit import save_tiny_vit

CPU = torch.device("cpu")


@pytest.fixture
def learner(tmp_path):
    settings = NcmTunedSettings(
        kind="ncm_tuned",
        backbone=save_tiny_vit(tmp_path),
        temperature=16.0,
        generated_weight=0.5,
        base=recipe(passes=6),
    )
    return NcmTuned(settings, 5, CPU)


def test_the_backbone_moves_in_the_base_session_only(learner):
    def weights():
        return [p.detach().clone() for p in learner.backbone.parameters()]

    start = weights()
    learner.begin_session((0, 1, 2), (0, 1, 2))
    losses = learner.learn(base_data(), seed=0)
    tuned, rows = weights(), learner.rows[:3].clone()
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(start, tuned, strict=True) if a.ndim > 1)
    learner.begin_session((3, 4), (0, 1, 2, 3, 4))
    assert learner.learn(session_data(), seed=1) == []
    assert all(torch.equal(a, b) for a, b in zip(tuned, weights(), strict=True))
    assert torch.equal(learner.rows[:3], rows)


def test_prototypes_are_means_of_the_trained_features(learner):
    learner.begin_session((0, 1, 2), (0, 1, 2))
    data = base_data()
    learner.learn(data, seed=0)
    made = prototypes(learner.features(data.images), data.labels, data.is_generated, 5, 0.5)
    assert torch.equal(learner.rows, made)
