"""The sampling chain (Eq. 4), and the gradient of an image loss through one of its steps.

Paper, "Preceptural Misalignment Measurement": the gradients on the other steps remain frozen. So the noise
predictions of all steps but k are held constant and the scheduler's own path, which is affine in latents and
predictions, is kept. Then x_0 depends on the prediction of step k only through

    d x_0 / d eps_k = coef_k            (a number; for DDIM  -(sigma_k - sigma_{k+1}), sigma^2 = (1 - a) / a)

so that the gradient falls into two stages that share no memory: g = d loss / d x_0 through the decoder, then
one noise prediction with gradient and backward of <coef_k g, eps_k>. The result is that of autograd through
the whole frozen chain. Merely running the steps after k without gradient would cut the path, and give none
for any k but the last: the path through ``scheduler.step`` is what carries it.

Guidance follows diffusers: eps = eps_null + s (eps_prompt - eps_null), s = 1 + w of Eq. 4, and both branches
have gradient.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tasks.diffusion import adapters
from tasks.diffusion.recording import Recorder

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel

    from tasks.diffusion.generator import StableDiffusion

SchedulerName = Literal["ddim", "dpmsolver++"]
CoefMode = Literal["exact", "unit"]
Scheduler: TypeAlias = "DDIMScheduler | DPMSolverMultistepScheduler"

ImageLoss = Callable[[Float[Tensor, "m 3 h w"], slice], Float[Tensor, " m"]]
"""Loss of each of some images (unclamped, about [0, 1]); the slice says which of the batch they are."""


@dataclass(frozen=True)
class Condition:
    """What a chain is conditioned on: prompt embeddings, the null prompt's, and the guidance scale s."""

    prompts: Float[Tensor, "n tokens d"]
    null: Float[Tensor, "1 tokens d"]
    scale: float

    @property
    def guided(self) -> bool:
        """Whether the null branch is computed; s <= 1 leaves it out, as diffusers does."""
        return self.scale > 1


@dataclass(frozen=True)
class ChainResult:
    """Final latents [n, c, h, w]; ``kept[k]`` = (latents before step k, the timestep of step k)."""

    latents: Tensor
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class StepGradient:
    """What one backward pass saw: each image's loss, the images (detached, unclamped), the anchor's loss."""

    losses: Float[Tensor, " n"]
    images: Float[Tensor, "n 3 h w"]
    anchor: float


def make_scheduler(config: Mapping[str, Any], name: SchedulerName) -> Scheduler:
    """A deterministic scheduler over a pipeline's own noise schedule.

    Clipping of the predicted latents is off whatever the configuration says: it belongs to pixel models, and
    the chain would not be affine with it.

    Args:
        config: the ``scheduler.config`` of any Stable Diffusion pipeline.
        name: ``ddim`` (eta = 0) or ``dpmsolver++`` (second order).

    Raises:
        ValueError: an unknown name.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    kinds: dict[str, tuple[type, dict[str, Any]]] = {
        "ddim": (DDIMScheduler, {"clip_sample": False, "thresholding": False}),
        "dpmsolver++": (
            DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver++", "thresholding": False, "use_flow_sigmas": False},
        ),
    }
    if name not in kinds:
        raise ValueError(f"scheduler {name!r} is unknown; it is one of {', '.join(kinds)}")
    kind, fixed = kinds[name]
    known = set(inspect.signature(kind).parameters)
    return kind(**{**{key: value for key, value in config.items() if key in known}, **fixed})


def timesteps_of(scheduler: Scheduler, n_steps: int) -> Int[Tensor, " n_steps"]:
    """The chain's timesteps, noisiest first. The scheduler is left as it was.

    Raises:
        ValueError: n_steps outside 1..num_train_timesteps.
    """
    return _fresh(scheduler, n_steps).timesteps


def _fresh(scheduler: Scheduler, n_steps: int) -> Scheduler:
    """A copy at the start of a chain: DPM-Solver++ keeps earlier predictions as state."""
    if not 1 <= n_steps <= scheduler.config.num_train_timesteps:
        raise ValueError(f"n_steps must be 1 to {scheduler.config.num_train_timesteps}, got {n_steps}")
    fresh = copy.deepcopy(scheduler)
    fresh.set_timesteps(n_steps)
    return fresh


def guided_noise(
    unet: "UNet2DConditionModel | Recorder",
    x: Float[Tensor, "n c h w"],
    timestep: Tensor,
    condition: Condition,
) -> Float[Tensor, "n c h w"]:
    """The guided prediction of Eq. 4 at one timestep."""
    if not condition.guided:
        return _prediction(unet, x, timestep, condition.prompts)
    context = torch.cat([condition.null.expand_as(condition.prompts), condition.prompts])
    null, prompt = _prediction(unet, torch.cat([x, x]), timestep, context).chunk(2)
    return null + condition.scale * (prompt - null)


def _prediction(
    unet: "UNet2DConditionModel | Recorder", x: Tensor, timestep: Tensor, context: Tensor
) -> Float[Tensor, "n c h w"]:
    if isinstance(unet, Recorder):
        return unet(x, timestep, context)
    return unet(x, timestep, context, return_dict=False)[0]


@torch.no_grad()
def sample_chain(
    unet: "UNet2DConditionModel",
    scheduler: Scheduler,
    n_steps: int,
    noise: Float[Tensor, "n c h w"],
    condition: Condition,
    keep_steps: Sequence[int] = (),
    recorder: Recorder | None = None,
) -> ChainResult:
    """Denoise from pure noise in ``n_steps`` deterministic steps, without gradient.

    Args:
        unet: the noise predictor, with or without an adapter.
        scheduler: not changed; a copy walks the chain.
        n_steps: how many steps.
        noise: standard normal.
        condition: prompts and guidance.
        keep_steps: indices of the steps whose input latents are returned too.
        recorder: of ``unet``, to predict with where its weights hold all there is of the adapter.

    Raises:
        ValueError: a step to keep is not in 0..n_steps-1.
    """
    if wrong := [k for k in keep_steps if not 0 <= k < n_steps]:
        raise ValueError(f"steps {wrong} are not in the chain, which has steps 0 to {n_steps - 1}")
    walker = _fresh(scheduler, n_steps)
    x = noise * walker.init_noise_sigma
    kept = {}
    with adapters.merged(unet) as whole:
        model = unet if recorder is None or not whole else recorder.begun()
        for k, timestep in enumerate(walker.timesteps):
            if k in keep_steps:
                kept[k] = (x, timestep)
            x = walker.step(guided_noise(model, x, timestep, condition), timestep, x, return_dict=False)[0]
    return ChainResult(latents=x, kept=kept)


@lru_cache(maxsize=16)
@torch.enable_grad()
def step_coefficients(scheduler: Scheduler, n_steps: int) -> Float[Tensor, " n_steps"]:
    """The derivative of x_0 by the prediction of each step, by autograd through the scheduler on a scalar.

    Exact for any scheduler whose step is affine, whatever it carries from step to step. Remembered for each scheduler.

    Returns:
        float32 [n_steps], not to be changed; negative for DDIM on a noise-predicting model.
    """
    walker = _fresh(scheduler, n_steps)
    predictions = [torch.zeros(1, 1, 1, 1, requires_grad=True) for _ in range(n_steps)]
    x = torch.ones(1, 1, 1, 1)
    for prediction, timestep in zip(predictions, walker.timesteps, strict=True):
        x = walker.step(prediction, timestep, x, return_dict=False)[0]
    return torch.stack([g.flatten()[0] for g in torch.autograd.grad(x.sum(), predictions)])


def one_step_gradient(
    generator: "StableDiffusion",
    prompts: Sequence[str],
    seeds: Sequence[int],
    step: int,
    image_loss: ImageLoss,
    *,
    coef_mode: CoefMode,
    anchor: float = 0.0,
) -> StepGradient:
    """Draw images and add d mean(loss) / d adapter, through step ``step`` alone, to the adapter's ``.grad``.

    Args:
        generator: with an adapter attached.
        prompts: n prompts.
        seeds: n seeds of the initial noise.
        step: k, 0 to steps - 1; 0 is the noisiest.
        image_loss: loss of each image; called on parts of the batch.
        coef_mode: ``exact`` is the true coefficient, which fades towards the last steps; ``unit`` keeps its
            sign and makes its size 1, so that every step weighs alike.
        anchor: weight of the mean squared difference to the base model's prediction at that step.

    Returns:
        Loss of each image and the images themselves, before the update.

    Raises:
        ValueError: ``step`` is not in the chain.
    """
    condition = generator.condition(prompts)
    chain = generator.sample_latents(prompts, seeds, keep_step=[step])
    losses, images, gradient = _image_side(generator, chain.latents, image_loss)
    coefficient = step_coefficients(generator.scheduler, generator.settings.steps)[step].item()
    if coef_mode == "unit":
        coefficient = 1.0 if coefficient > 0 else -1.0
    x, timestep = chain.kept[step]
    prediction = guided_noise(generator.unet, x, timestep, condition)
    objective = (prediction.to(gradient.dtype) * (coefficient * gradient)).sum()
    drift = _drift(generator.unet, x, timestep, condition, prediction) if anchor else torch.zeros(())
    (objective + anchor * drift).backward()
    return StepGradient(losses=losses, images=images, anchor=anchor * float(drift.detach()))


def _image_side(
    generator: "StableDiffusion", latents: Tensor, image_loss: ImageLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """Stage 1: losses [n], images [n, 3, h, w] and d mean(loss) / d latents, a few images at a time."""
    n, size = len(latents), generator.gradient_chunk
    losses: list[Tensor] = []
    images: list[Tensor] = []
    gradients: list[Tensor] = []
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        z = latents[part].to(torch.promote_types(latents.dtype, torch.float32)).detach().requires_grad_()
        decoded = generator.decode_with_gradient(z)
        loss = image_loss(decoded, part)
        gradients += torch.autograd.grad(loss.sum() / n, z)
        losses.append(loss.detach())
        images.append(decoded.detach())
    return torch.cat(losses), torch.cat(images), torch.cat(gradients)


def _drift(
    unet: "UNet2DConditionModel", x: Tensor, timestep: Tensor, condition: Condition, prediction: Tensor
) -> Tensor:
    """Mean squared difference between the adapted and the base prediction."""
    with torch.no_grad(), adapters.disabled(unet):
        base = guided_noise(unet, x, timestep, condition)
    return (prediction.float() - base.float()).square().mean()
