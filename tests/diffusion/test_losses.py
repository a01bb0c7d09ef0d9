"""Eq. 3, 5 and 7 as numbers, and their signs as printed and as meant."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tasks.diffusion.losses import contrastive_loss, denoising_loss, perceptual_loss, similarities
from tasks.similarity.ssim import ssim


def images(n: int, seed: int) -> Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_perceptual_loss_is_a_distance_and_as_printed_the_similarity() -> None:
    x, positive = images(3, 0), images(3, 1)
    assert torch.allclose(perceptual_loss(x, positive), 1 - ssim(x, positive))
    assert torch.allclose(perceptual_loss(x, positive, "as_printed"), ssim(x, positive))
    assert torch.allclose(perceptual_loss(x, x), torch.zeros(3), atol=1e-6)


@pytest.mark.parametrize(("sign", "direction"), [("distance", 1), ("as_printed", -1)])
def test_contrastive_loss_is_the_mean_over_each_images_own_negatives(sign: str, direction: int) -> None:
    x, positive = images(3, 0), images(3, 1)
    negatives = [images(2, 2), images(0, 3), images(8, 4)]
    found = contrastive_loss(x, positive, negatives, 0.7, 0.2, sign)
    for i in range(3):
        terms = [
            max(
                direction
                * (0.7 * ssim(x[i : i + 1], n[None]) - ssim(x[i : i + 1], positive[i : i + 1])).item()
                + 0.2,
                0,
            )
            for n in negatives[i]
        ]
        assert found[i].item() == pytest.approx(sum(terms) / len(terms) if terms else 0, abs=1e-6)


def test_the_hinge_is_silent_once_the_margin_is_kept() -> None:
    x = images(1, 0).requires_grad_()
    loss = contrastive_loss(x, x.detach(), [1 - x.detach()], 1.0, 0.1)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert not gradient.any()


@pytest.mark.parametrize(("sign", "closer"), [("distance", True), ("as_printed", False)])
def test_descending_the_losses_moves_images_as_eq_6_says_or_as_printed(sign: str, closer: bool) -> None:
    start = images(4, 0)
    positive = (start + 0.3 * (images(4, 1) - 0.5)).clamp(0, 1)
    negative = (start + 0.3 * (images(4, 2) - 0.5)).clamp(0, 1)
    x = start.clone().requires_grad_()
    loss = perceptual_loss(x, positive, sign) + contrastive_loss(
        x, positive, list(negative[:, None]), 1, 0.5, sign
    )
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    moved = start - 0.5 * gradient
    gained = ssim(moved.clamp(0, 1), positive) - ssim(start, positive)
    lost = ssim(moved.clamp(0, 1), negative) - ssim(start, negative)
    assert ((gained - lost > 0) == closer).all()
    assert ((gained > 0) == closer).all()


def test_one_batch_of_negatives_for_each_image() -> None:
    with pytest.raises(ValueError, match="3 images and 1 batches"):
        similarities(images(3, 0), images(3, 1), [images(2, 2)])


class Oracle:
    """A noise predictor that knows the answer: x_t and the latents tell the noise."""

    def __init__(self, scheduler: DDIMScheduler, latents: Tensor, kind: str) -> None:
        self.alpha, self.latents, self.kind = scheduler.alphas_cumprod, latents, kind

    def __call__(self, x: Tensor, t: Tensor, context: Tensor, return_dict: bool) -> tuple[Tensor]:
        a = self.alpha[t].view(-1, 1, 1, 1)
        noise = (x - a.sqrt() * self.latents) / (1 - a).sqrt()
        answers = {
            "epsilon": noise,
            "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * self.latents,
            "sample": self.latents,
        }
        return (answers[self.kind],)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_denoising_loss_is_zero_for_an_oracle_and_one_for_silence(kind: str) -> None:
    scheduler = DDIMScheduler(prediction_type=kind)
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(16, 4, 8, 8, generator=rng), torch.randn(16, 4, 8, 8, generator=rng)
    t = torch.linspace(5, 995, 16).long()
    assert denoising_loss(Oracle(scheduler, latents, kind), scheduler, latents, None, t, noise) < 1e-6
    silent = denoising_loss(
        lambda x, t, c, return_dict: (torch.zeros_like(x),), scheduler, latents, None, t, noise
    )
    assert silent.item() == pytest.approx(1, abs=0.1)
