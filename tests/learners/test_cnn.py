"""Learners that need features and nothing of a ViT work on a CNN too; its batch statistics stay as they came."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from tasks.classification.backbone import BackboneSettings
from tasks.learners.factory import make_learner
from tests.learners.given import base_data, recommended, session_data

CNN = "test_resnet"


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> BackboneSettings:
    path: Path = tmp_path_factory.mktemp("cnn") / "model.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(CNN, num_classes=0).state_dict(), path)
    values = {"name": CNN, "checkpoint": str(path), "size": 32, "mean": None, "std": None}
    return BackboneSettings.model_validate(values)


@pytest.mark.parametrize("kind", ["ncm", "ncm_tuned", "teen", "cec", "nc_fscil"])
def test_a_cnn_learns_two_sessions(kind: str, cnn: BackboneSettings) -> None:
    learner = make_learner(recommended(kind, cnn), 5, torch.device("cpu"))
    statistics = {k: v.clone() for k, v in learner.backbone.state_dict().items() if "running" in k}
    learner.begin_session((0, 1, 2), (0, 1, 2))
    learner.learn(base_data(3), seed=0)
    learner.begin_session((3, 4), (0, 1, 2, 3, 4))
    learner.learn(session_data(2), seed=0)
    logits = learner.predict(session_data().images, (0, 1, 2, 3, 4))
    assert logits.shape == (6, 5)
    assert torch.isfinite(logits).all()
    after = learner.backbone.state_dict()
    assert statistics
    assert all(torch.equal(after[k], v) for k, v in statistics.items())
