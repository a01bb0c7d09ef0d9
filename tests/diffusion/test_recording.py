"""Recorded predictions against the model's own: equal bit for bit, whatever happens to the adapter meanwhile."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tasks.diffusion import adapters
from tasks.diffusion import recording as recording_module
from tasks.diffusion.generator import StableDiffusion
from tasks.diffusion.recording import Recorder
from tests.diffusion.conftest import awaken

Build = Callable[..., StableDiffusion]

PROMPTS, SEEDS = ["A picture of a seven", "IV", "two dots"], [1, 2, 3]


def recording(generator: StableDiffusion) -> StableDiffusion:
    """The generator, recording each shape as soon as it has seen every timestep."""
    generator.recorder = Recorder(generator.unet, often=0)
    generator.draw(PROMPTS, SEEDS)
    assert not generator.recorder._recordings, "the first chain is the model's own"
    return generator


def plain(generator: StableDiffusion) -> Tensor:
    """What it draws without recordings."""
    kept, generator.recorder = generator.recorder, None
    images = generator.draw(PROMPTS, SEEDS)
    generator.recorder = kept
    return images


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_one_recording_serves_every_adapter(
    build: Build, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = recording(build(guidance=guidance))
    drawn = [generator.draw(PROMPTS, SEEDS)]
    assert torch.equal(drawn[0], plain(generator))
    recorder = generator.recorder
    assert recorder is not None
    monkeypatch.setattr(recording_module, "_recorded", None)  # from here on there is one recording
    for size in (0.1, 0.3):
        awaken(generator.begin_tuning(rank=2, alpha=2, seed=0), size)
        drawn.append(generator.draw(PROMPTS, SEEDS))
        assert torch.equal(drawn[-1], plain(generator))
    generator.use_adapter(None)
    assert torch.equal(generator.draw(PROMPTS, SEEDS), drawn[0])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    assert len(recorder._recordings) == 1


def test_a_recording_made_with_an_adapter_does_not_hold_it(build: Build) -> None:
    generator = recording(build())
    awaken(generator.begin_tuning(rank=2, alpha=2, seed=0))
    tuned = generator.draw(PROMPTS, SEEDS)
    generator.use_adapter(None)
    assert torch.equal(generator.draw(PROMPTS, SEEDS), plain(generator))
    assert not torch.equal(plain(generator), tuned)


def test_an_adapter_that_is_not_merged_is_not_left_out(build: Build) -> None:
    generator = recording(build(dtype="bfloat16"))
    base = generator.draw(PROMPTS, SEEDS)
    awaken(generator.begin_tuning(rank=2, alpha=2, seed=0))
    with adapters.merged(generator.unet) as whole:
        assert not whole
    assert torch.equal(generator.draw(PROMPTS, SEEDS), plain(generator))
    assert not torch.equal(plain(generator), base)


def test_a_shape_is_recorded_once_it_came_often(build: Build) -> None:
    generator = build(batch=2, steps=3)
    generator.recorder = recorder = Recorder(generator.unet, often=5)
    counts = []
    for batch in (2, 2, 3):
        generator.batch = batch
        generator.draw(PROMPTS[:batch], SEEDS[:batch])
        counts.append(len(recorder._recordings))
    assert counts == [0, 1, 1]
