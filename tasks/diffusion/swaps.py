"""Which denoising step settles what: draw with one prompt until step k, then with another (the paper's premise).

For two prompts A and B that differ in one thing, and the same noise, x_k is the image that A drew for k steps
and B for the rest: x_0 is B's own image and x_n is A's. How far x_k is from B's relative to both,

    s_k = d(x_k, x_0) / (d(x_k, x_n) + d(x_k, x_0))        d = 1 - SSIM

is 0 where B still decides and 1 where A has decided. The thing is settled from the first step on at which at
least half of the images keep A, s_k > 1/2, there and at every later step.
"""

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from tasks.diffusion import adapters
from tasks.diffusion.sampler import Condition, Scheduler, guided_noise
from tasks.records import Frozen
from tasks.similarity.ssim import ssim_distance

if TYPE_CHECKING:
    from tasks.diffusion.generator import StableDiffusion

KEPT = 0.5


class SwapSettings(Frozen):
    """Pairs of prompts that differ in one thing, and how many images of each.

    A pair's prompts may hold ``{a}``, each of ``subjects`` in turn, and ``{b}``, the subject after it.

    Raises:
        ValueError: two equal prompts, or a placeholder other than ``{a}`` and ``{b}``.
    """

    subjects: tuple[str, ...] = Field(min_length=2)
    pairs: dict[str, tuple[str, str]] = Field(min_length=1)
    images: int = Field(ge=1)
    least_change: float = Field(gt=0, le=2)
    seed: int = Field(ge=0)
    judge: str | None

    @model_validator(mode="after")
    def _differ(self) -> Self:
        for what in self.pairs:
            if any(first == second for first, second in self.prompts(what)):
                raise ValueError(f"windows.pairs.{what} has two equal prompts; they must differ in one thing")
        return self

    def prompts(self, what: str) -> list[tuple[str, str]]:
        """Both prompts of a pair, for each subject."""
        nexts = (*self.subjects[1:], self.subjects[0])
        filled = []
        for a, b in zip(self.subjects, nexts, strict=True):
            try:
                first, second = (prompt.format(a=a, b=b) for prompt in self.pairs[what])
            except (LookupError, ValueError) as error:
                raise ValueError(
                    f"windows.pairs.{what}: {error!r}; a prompt may hold {{a}} and {{b}} and no other braces"
                ) from error
            filled.append((first, second))
        return filled


@torch.no_grad()
def swapped_images(
    generator: "StableDiffusion", first: Sequence[str], second: Sequence[str], seeds: Sequence[int]
) -> Float[Tensor, "steps+1 n 3 h w"]:
    """Images whose prompts are swapped after each number of steps, all n in one batch.

    The part of a chain before its swap is shared, so that n steps cost n + n (n + 1) / 2 predictions.

    Args:
        generator: draws with its own steps, scheduler, guidance and adapter.
        first: n prompts for the first k steps.
        second: n prompts for the steps after them.
        seeds: n seeds of the initial noise.

    Returns:
        float32 in [0, 1], on the CPU; [k] swapped after k steps: [0] is drawn with ``second`` alone, [steps]
        with ``first`` alone, both as :meth:`StableDiffusion.draw` draws a batch of n.

    Raises:
        ValueError: not as many of each, or none.
    """
    if not len(first) == len(second) == len(seeds) or not seeds:
        raise ValueError(
            f"got {len(first)} first prompts, {len(second)} second ones and {len(seeds)} seeds; "
            "one of each for each image"
        )
    before, after = generator.condition(first), generator.condition(second)
    walker = copy.deepcopy(generator.scheduler)
    walker.set_timesteps(generator.settings.steps)
    x = generator.initial_noise(seeds) * walker.init_noise_sigma
    ends = []
    with adapters.merged(generator.unet):
        for k in range(generator.settings.steps):
            ends.append(_walk(generator, copy.deepcopy(walker), x, after, range(k, generator.settings.steps)))
            x = _walk(generator, walker, x, before, range(k, k + 1))
    return torch.stack([generator.decode(end).cpu() for end in [*ends, x]])


def _walk(
    generator: "StableDiffusion", walker: Scheduler, x: Tensor, condition: Condition, steps: range
) -> Tensor:
    """Latents after some more steps; the walker keeps what a multistep scheduler remembers."""
    for k in steps:
        timestep = walker.timesteps[k]
        prediction = guided_noise(generator.unet, x, timestep, condition)
        x = walker.step(prediction, timestep, x, return_dict=False)[0]
    return x


def nearness(images: Float[Tensor, "k n 3 h w"]) -> Float[Tensor, "k n"]:
    """s_k of each image: 0 where it is the second prompt's, 1 where it is the first's.

    Args:
        images: as :func:`swapped_images` returns them, sides at least 11.

    Returns:
        [k, n] in [0, 1]; NaN for an image that is as near as can be to both.
    """
    second, first = images[0], images[-1]
    to_second = torch.stack([ssim_distance(x, second) for x in images])
    to_first = torch.stack([ssim_distance(x, first) for x in images])
    return to_second / (to_second + to_first)


def differing(images: Float[Tensor, "k n 3 h w"], least: float) -> Tensor:
    """Which images the two prompts draw differently, 1 - SSIM at least ``least``: bool [n]."""
    return ssim_distance(images[0], images[-1]) >= least


def settled_at(shares: Sequence[float]) -> int | None:
    """The first k from which on at least half keep the first prompt's; None if even the last does not.

    Args:
        shares: share of the images that keep it when the prompt is swapped after k = 0, 1, ... steps.
    """
    settled = None
    for k in reversed(range(len(shares))):
        if shares[k] < KEPT:
            break
        settled = k
    return settled
