"""Each learner on ViT-B/16 at 224 px with random weights: a base epoch, a session, predictions; time and memory.

    .venv/bin/python -m pytest -m slow -s tests/learners/test_vit_b16.py

On a GPU where there is one, else on the CPU with very few pictures.
"""

import time
from functools import cache
from pathlib import Path

import pytest
import torch

from tasks.classification.backbone import BackboneSettings
from tasks.learners.base import TrainingData
from tasks.learners.factory import LEARNERS, NAMED, make_learner
from tasks.memory import PeakMemory
from tests.full_size import VIT, save_vit_b16
from tests.learners.given import recommended

SESSIONS = (((0, 1, 2), (0, 1, 2)), ((3, 4), (0, 1, 2, 3, 4)))
SIDE, SHOTS = 224, 2

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_vit_b16(file, device())
    return file


@cache
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pictures(classes: tuple[int, ...], seed: int) -> TrainingData:
    """Noise about a colour of the class's own."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes).repeat_interleave(SHOTS)
    colours = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))[labels]
    noise = torch.rand(len(labels), 3, SIDE, SIDE, generator=rng)
    return TrainingData(
        (colours[:, :, None, None] + noise) / 2, labels, torch.zeros(len(labels), dtype=torch.bool)
    )


@pytest.mark.parametrize("kind", sorted([*LEARNERS, *NAMED]))
def test_a_base_epoch_and_a_session(kind: str, weights: Path) -> None:
    backbone = BackboneSettings(name=VIT, checkpoint=str(weights), size=None, mean=None, std=None)
    names = ["ant", "bee", "cat", "dog", "eel"]
    memory, rows = PeakMemory(), []
    learner = make_learner(recommended(kind, backbone), len(names), device(), names)
    for session, (new, seen) in enumerate(SESSIONS):
        data, began = pictures(new, seed=session), time.monotonic()
        learner.begin_session(new, seen)
        losses = learner.learn(data, seed=session)
        rows.append(time.monotonic() - began)
        assert all(torch.isfinite(torch.tensor(loss)) for loss in losses)
        logits = learner.predict(pictures(seen, seed=9).images, seen)
        assert logits.shape == (SHOTS * len(seen), len(names))
        assert torch.isfinite(logits[:, list(seen)]).all()
        assert set(logits.argmax(1).tolist()) <= set(seen)
    gib = (memory.gpu_mib or memory.mib or float("nan")) / 1024
    print(
        f"\n{kind}: base epoch {rows[0]:.1f} s, session {rows[1]:.1f} s, peak {gib:.1f} GiB on {device().type}"
    )
