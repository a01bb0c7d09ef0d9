"""A run that leaves the numbers ends with a sentence: what happened, in which session, epoch and stage, and what to lower.

Each goes on from the sealed stages of the experiment that the session of tests has finished, in a copy of its state.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from flows.experiment import fscil
from tasks import tune_lora
from tasks.collapse import CollapseError
from tasks.diffusion import adapters
from tasks.diffusion.generator import StableDiffusion
from tasks.memory import MemoryShortageError
from tasks.records import EpochRecord
from tasks.whereabouts import with_place
from tests.conftest import Place


@pytest.fixture
def place(finished: Place, tmp_path: Path) -> Place:
    shutil.copytree(finished.root / "state", tmp_path / "state")
    return Place(tmp_path)


def sentence(place: Place, kind: type[Exception], *overrides: str) -> str:
    with pytest.raises(kind) as caught:
        fscil("digits", "guided", 0, place.overrides(*overrides))
    return with_place(caught.value)


def sealed(place: Place, stage: str) -> set[str]:
    return {path.name for path in place.root.glob(f"state/stages/{stage}/*") if path.suffix != ".partial"}


def test_a_classifier_that_diverges_is_not_sealed(place: Place) -> None:
    before = sealed(place, "train_classifier")
    said = sentence(place, ValueError, "learner.base.learning_rate=1e30")
    assert said.startswith("session 0, epoch 0, train_classifier: ")
    assert "learning_rate" in said
    assert sealed(place, "train_classifier") == before


def test_a_tuning_that_diverges_is_not_sealed(place: Place) -> None:
    before = sealed(place, "tune_lora")
    said = sentence(place, ValueError, "tuning.learning_rate=1e30")
    assert said.startswith("session 0, epoch 0, tune_lora: tuning diverged at update 1 (step ")
    assert said.endswith("lower tuning.learning_rate or raise tuning.anchor")
    assert sealed(place, "tune_lora") == before


def test_a_collapsed_adapter_s_images_are_not_sealed_nor_trained_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = StableDiffusion.draw

    def collapsed(self: StableDiffusion, prompts: list[str], seeds: list[int]) -> torch.Tensor:
        images = draw(self, prompts, seeds)
        return (
            images.mean((2, 3), keepdim=True).expand_as(images) if adapters.is_attached(self.unet) else images
        )

    monkeypatch.setattr(StableDiffusion, "draw", collapsed)
    drawn, trained = sealed(place, "regenerate"), sealed(place, "train_classifier")
    said = sentence(place, CollapseError, "tuning.updates=1")
    assert re.match(
        r"session 0, epoch 0, regenerate: (\d+) of \1 generated images are near-constant \(zero \d+, ", said
    )
    assert "lower tuning.learning_rate" in said
    assert sealed(place, "regenerate") == drawn
    assert sealed(place, "train_classifier") == trained


@pytest.mark.slow
def test_one_image_of_each_new_class_is_enough_for_a_run(place: Place) -> None:
    fscil("digits", "guided", 0, place.overrides("dataset.k_shot=1"))
    epochs = [
        EpochRecord.model_validate_json(path.read_bytes())
        for path in sorted(place.run("guided").glob("session-0[12]/epoch-*/record.json"))
    ]
    assert len(epochs) >= 2
    assert all(epoch.tune is not None and epoch.regenerate is not None for epoch in epochs[:1])
    record = json.loads((place.run("guided") / "experiment.json").read_text())
    assert len(record["sessions"]) == 3


def test_a_tuning_that_does_not_fit_the_memory_says_what_to_lower(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(tune_lora, "tune", too_much)
    said = sentence(place, MemoryShortageError, "tuning.updates=3")
    assert said == (
        "session 0, epoch 0, tune_lora: the memory does not suffice (CUDA out of memory. Tried to allocate 20.00 GiB.); "
        "lower tuning.batch or generator.size"
    )
