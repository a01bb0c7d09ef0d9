"""The terms of Eq. 8, L = L_LDM + beta_1 L_P + beta_2 L_C, and the decision about their signs.

**Signs.** Eq. 5, L_P = E[SSIM(x, x+)], and Eq. 7, L_C = E[max(SSIM(x, x+) - lambda SSIM(x, x-) + m, 0)], are
minimised. SSIM is a similarity; so, as printed, they drive the generated x away from the failure x+ and
towards the negatives x-, against Eq. 6, SSIM(x, x+) > SSIM(x, x-), and the text. Here (``distance``) they are

    L_P = 1 - SSIM(x, x+)                                                Eq. 5 of a distance
    L_C = mean over x- of max(lambda SSIM(x, x-) - SSIM(x, x+) + m, 0)   Eq. 7, similarities exchanged

and ``loss_sign=as_printed`` keeps the letter, for the record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tasks.diffusion.sampler import Scheduler
from tasks.similarity.ssim import ssim

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

LossSign = Literal["distance", "as_printed"]


@dataclass(frozen=True)
class Similarities:
    """SSIM of n images with their positives and with all m negatives; ``owner[j]`` is negative j's image."""

    positive: Float[Tensor, " n"]
    negative: Float[Tensor, " m"]
    owner: Int[Tensor, " m"]

    def mean_over_negatives(self, values: Float[Tensor, " m"]) -> Float[Tensor, " n"]:
        """Average values of negatives for each image; 0 for an image without any."""
        total = torch.zeros_like(self.positive).index_add(0, self.owner, values)
        return total / torch.bincount(self.owner, minlength=len(total)).clamp(min=1)


def similarities(
    x: Float[Tensor, "n 3 h w"],
    positive: Float[Tensor, "n 3 h w"],
    negatives: Sequence[Float[Tensor, "_ 3 h w"]],
) -> Similarities:
    """All SSIMs that the losses need, in two calls.

    Args:
        x: generated images, about [0, 1].
        positive: the failure that each should approach, [0, 1].
        negatives: for each image a batch, maybe empty, of images in [0, 1] that it should leave.

    Raises:
        ValueError: not one batch of negatives for each image, or as :func:`tasks.similarity.ssim.ssim`.
    """
    if len(negatives) != len(x):
        raise ValueError(f"got {len(x)} images and {len(negatives)} batches of negatives; one for each image")
    counts = torch.tensor([len(batch) for batch in negatives], device=x.device)
    owner = torch.repeat_interleave(torch.arange(len(x), device=x.device), counts)
    with_positive = ssim(x, positive)
    # index_select, not x[owner]: the gradient of indexing adds up in whatever order the threads come
    with_negative = (
        ssim(x.index_select(0, owner), torch.cat(list(negatives))) if len(owner) else x.new_zeros(0)
    )
    return Similarities(with_positive, with_negative.to(with_positive.dtype), owner)


def perceptual(found: Similarities, sign: LossSign) -> Float[Tensor, " n"]:
    """L_P (Eq. 5) of each image, from its similarities."""
    return 1 - found.positive if sign == "distance" else found.positive


def contrastive(found: Similarities, lam: float, margin: float, sign: LossSign) -> Float[Tensor, " n"]:
    """L_C (Eq. 7) of each image, averaged over its negatives; 0 for an image without any."""
    direction = 1.0 if sign == "distance" else -1.0
    gap = lam * found.negative - found.positive.index_select(0, found.owner)
    return found.mean_over_negatives((direction * gap + margin).clamp(min=0))


def perceptual_loss(
    x: Float[Tensor, "n 3 h w"], positive: Float[Tensor, "n 3 h w"], sign: LossSign = "distance"
) -> Float[Tensor, " n"]:
    """L_P (Eq. 5): [n] in [0, 2] for ``distance``, the SSIM itself for ``as_printed``."""
    return perceptual(similarities(x, positive, [x[:0].detach()] * len(x)), sign)


def contrastive_loss(
    x: Float[Tensor, "n 3 h w"],
    positive: Float[Tensor, "n 3 h w"],
    negatives: Sequence[Float[Tensor, "_ 3 h w"]],
    lam: float,
    margin: float,
    sign: LossSign = "distance",
) -> Float[Tensor, " n"]:
    """L_C (Eq. 7): [n], at least 0.

    Args:
        x: generated images, about [0, 1].
        positive: [0, 1].
        negatives: for each image a batch, maybe empty, in [0, 1].
        lam: lambda, the weight of the negatives.
        margin: m.
        sign: ``distance`` as Eq. 6 wants it, or ``as_printed``.
    """
    return contrastive(similarities(x, positive, negatives), lam, margin, sign)


def denoising_loss(
    unet: "UNet2DConditionModel",
    scheduler: Scheduler,
    latents: Float[Tensor, "n c h w"],
    context: Float[Tensor, "n tokens d"],
    timesteps: Int[Tensor, " n"],
    noise: Float[Tensor, "n c h w"],
) -> Float[Tensor, ""]:
    """L_LDM (Eq. 3, squared as usual, w_t = 1): how well the noise added to the latents is predicted.

    Args:
        unet: the noise predictor.
        scheduler: its noise schedule and what the model predicts (noise, velocity or sample).
        latents: scaled latents of the positives.
        context: embeddings of their prompts.
        timesteps: 0..num_train_timesteps-1.
        noise: standard normal.

    Returns:
        The mean squared error over all latents, in float32.
    """
    alpha = scheduler.alphas_cumprod.to(latents.device)[timesteps].view(-1, 1, 1, 1)
    keep, spoil = alpha.sqrt().to(latents.dtype), (1 - alpha).sqrt().to(latents.dtype)
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: keep * noise - spoil * latents,
        "sample": lambda: latents,
    }[scheduler.config.prediction_type]()
    predicted = unet(keep * latents + spoil * noise, timesteps, context, return_dict=False)[0]
    return functional.mse_loss(predicted.float(), target.float())
