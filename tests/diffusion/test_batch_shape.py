"""How much an image changes with the shape of the batch that it is drawn in: measured, printed, and bounded.

The batch shape is part of a set's fingerprint for this reason; one image less in the last batch changes nothing, since
it is filled up.
"""

import math

import pytest
import torch

from flows.config import load_config
from tasks.diffusion.generator import StableDiffusion


@pytest.mark.slow
def test_another_batch_shape_changes_last_bits_and_no_more() -> None:
    settings = load_config([]).generator
    prompts, seeds = ["a handwritten seven, white on black"] * 6, list(range(6))
    drawn = {}
    for batch in (6, 3, 1):
        generator = StableDiffusion.from_settings(
            settings.model_copy(update={"batch": batch}), torch.device("cpu")
        )
        drawn[batch] = generator.draw(prompts, seeds)
    for batch in (3, 1):
        worst = (drawn[6] - drawn[batch]).abs().max().item()
        steps = (drawn[6].mul(255).round() - drawn[batch].mul(255).round()).abs().max().item()
        print(
            f"batch 6 against {batch}: worst {worst:.1e}, {steps:.0f} of 255, PSNR {_psnr(drawn[6], drawn[batch]):.0f} dB"
        )
        assert worst < 1e-3


def _psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    error = (one - other).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)
