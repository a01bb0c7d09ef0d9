"""Swapped chains against plain ones, and the measure of what is settled against pictures made to order."""

from collections.abc import Callable

import pytest
import torch

from tasks.diffusion.generator import StableDiffusion
from tasks.diffusion.swaps import differing, nearness, settled_at, swapped_images
from tests.diffusion.conftest import awaken

Build = Callable[..., StableDiffusion]
FIRST, SECOND, SEEDS = ["a", "b", "c"], ["x", "y", "z"], [1, 2, 3]


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
def test_the_ends_are_the_prompts_own_images_and_the_middle_is_neither(build: Build, scheduler: str) -> None:
    generator = build(scheduler=scheduler, steps=4)
    awaken(generator.begin_tuning(2, 2, seed=0))
    images = swapped_images(generator, FIRST, SECOND, SEEDS)
    assert images.shape == (5, 3, 3, 16, 16)
    assert torch.equal(images[0], generator.draw(SECOND, SEEDS))
    assert torch.equal(images[-1], generator.draw(FIRST, SEEDS))
    assert not any(torch.equal(images[2], images[k]) for k in (0, 1, 3, 4))


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
def test_a_swap_is_a_chain_whose_condition_changes(build: Build, scheduler: str) -> None:
    """Against the scheduler walked by hand from the start, its memory included."""
    generator = build(scheduler=scheduler, steps=4, guidance=1.0)
    images = swapped_images(generator, FIRST, SECOND, SEEDS)
    generator.scheduler.set_timesteps(4)
    x = generator.initial_noise(SEEDS) * generator.scheduler.init_noise_sigma
    for k, timestep in enumerate(generator.scheduler.timesteps):
        context = generator.encode_prompts(FIRST if k < 3 else SECOND)
        with torch.no_grad():
            noise = generator.unet(x, timestep, context).sample
        x = generator.scheduler.step(noise, timestep, x).prev_sample
    assert torch.allclose(images[3], generator.decode(x), atol=1e-5)


def test_equal_prompts_draw_one_image_whenever_swapped(build: Build) -> None:
    images = swapped_images(build(steps=3), FIRST, FIRST, SEEDS)
    assert all(torch.allclose(image, images[0], atol=1e-6) for image in images)
    assert not differing(images, 0.01).any()


@pytest.mark.parametrize("n", [0, 2])
def test_as_many_seconds_as_firsts(build: Build, n: int) -> None:
    with pytest.raises(ValueError, match=f"3 first prompts, {n} second ones and 3 seeds"):
        swapped_images(build(), FIRST, SECOND[:n], SEEDS)


def test_a_picture_that_changes_at_step_three_is_settled_at_three() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 4, 3, 16, 16, generator=rng)
    images = torch.stack([b, b, b, a, a])
    near = nearness(images)
    assert torch.equal(near, torch.tensor([0.0, 0, 0, 1, 1])[:, None].expand(5, 4))
    assert settled_at((near > 0.5).float().mean(1).tolist()) == 3
    assert differing(images, 0.5).all()


def test_a_blend_is_nearer_to_what_it_has_more_of() -> None:
    rng = torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 1, 3, 16, 16, generator=rng)
    blends = torch.stack([b, 0.7 * b + 0.3 * a, 0.5 * a + 0.5 * b, 0.3 * b + 0.7 * a, a])
    near = nearness(blends).squeeze(1).tolist()
    assert near == sorted(near)
    assert near[2] == pytest.approx(0.5, abs=0.05)
    assert near[1] == pytest.approx(1 - near[3], abs=0.05)


@pytest.mark.parametrize(
    ("shares", "k"),
    [
        ([0.0, 0.2, 0.5, 0.9, 1.0], 2),
        ([0.0, 0.6, 0.4, 0.9, 1.0], 3),  # kept by chance once does not count
        ([1.0, 1.0, 1.0], 0),
        ([0.0, 0.1, 0.4], None),
    ],
)
def test_settled_means_from_there_on(shares: list[float], k: int | None) -> None:
    assert settled_at(shares) == k
