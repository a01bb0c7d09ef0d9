"""The contrastive finetuning strategy (Eq. 8): the adapter learns from triplets, a denoising step an update.

An update takes examples of one level, draws a step k of the level's part, draws their images with the adapter
as it is, and descends

    L_LDM + beta_p L_P + beta_c L_C          L_P and L_C through step k alone (``sampler.one_step_gradient``),
                                             L_LDM on the positive's latents, timestep from the same part

with AdamW and a clipped gradient norm. Every draw (examples, steps, noise) follows from ``seed``. A term whose
weight is 0 is not computed: without L_C no negative is looked at, without L_LDM nothing is encoded, without L_P
and L_C no image is drawn (unless ``anchor`` wants the chain).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self, TypeVar

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from tasks.diffusion.generator import StableDiffusion
from tasks.diffusion.losses import LossSign, contrastive, denoising_loss, perceptual, similarities
from tasks.diffusion.sampler import CoefMode, one_step_gradient, timesteps_of
from tasks.diffusion.windows import StepsRule, Window, draw_step, timestep_range, window_of
from tasks.records import Frozen, Level
from tasks.seeding import seed_for, torch_generator
from tasks.similarity.ssim import TAPS

Progress = Callable[[int, int], None]
Item = TypeVar("Item")


class TuningSettings(Frozen):
    """The adapter, the optimiser, the loss terms of Eq. 8 and how step k's gradient is weighed."""

    rank: int = Field(ge=1)
    alpha: float = Field(gt=0)
    learning_rate: float = Field(gt=0)
    updates: int = Field(ge=1)
    batch: int = Field(ge=1)
    beta_ldm: float = Field(ge=0)
    beta_p: float = Field(ge=0)
    beta_c: float = Field(ge=0)
    lam: float = Field(ge=0)
    margin: float = Field(ge=0)
    clip: float = Field(gt=0)
    border: float = Field(gt=0, lt=1)
    coef: CoefMode
    loss_sign: LossSign
    size: int | None = Field(ge=TAPS)
    anchor: float = Field(ge=0)

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if not any(self.weights.values()):
            raise ValueError("beta_ldm, beta_p and beta_c are all 0, so nothing would be tuned; raise one")
        return self

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each term of Eq. 8 by its series' name; 0 is off."""
        return {"ldm": self.beta_ldm, "perceptual": self.beta_p, "contrastive": self.beta_c}

    @property
    def draws(self) -> bool:
        """Whether an update needs the sampling chain."""
        return self.beta_p > 0 or self.beta_c > 0 or self.anchor > 0


@dataclass(frozen=True)
class TuningExample:
    """One prompt, the failure its image should approach [3, h, w], the images it should leave [m, 3, h, w].

    Images are in [0, 1], of the generator's size; ``seed`` names the example in all draws of noise.
    """

    prompt: str
    level: Level
    positive: Float[Tensor, "3 h w"]
    negatives: Float[Tensor, "m 3 h w"]
    seed: int


@dataclass(frozen=True)
class TuningResult:
    """One value an update for each statistic, and the step k of each update."""

    series: dict[str, list[float]] = field(default_factory=dict)
    steps_drawn: list[int] = field(default_factory=list)


class TuningError(ValueError):
    """Tuning left the finite numbers; the message names the update."""


def tune(
    generator: StableDiffusion,
    examples: Sequence[TuningExample],
    settings: TuningSettings,
    *,
    steps_rule: StepsRule,
    seed: int,
    progress: Progress | None = None,
) -> TuningResult:
    """Tune the generator's adapter in place; a new one is attached if there is none.

    Args:
        generator: its adapter, if any, is what tuning starts from.
        examples: at least one.
        settings: see configs/tuning/contrastive.yaml.
        steps_rule: ``guided`` by each example's level, ``random`` any step, ``first`` always the first half.
        seed: of the new adapter and of every draw.
        progress: called after each update with how many are done and how many there will be.

    Returns:
        Series ``loss ldm perceptual contrastive ssim_positive ssim_negative contrast grad_norm``: the terms
        without their weights, ``loss`` their weighted sum, ``contrast`` the drawn images' standard deviation.
        What was not computed has no series.

    Raises:
        ValueError: no example, or an adapter of another rank.
        TuningError: a loss, gradient or weight is not finite.
    """
    if not examples:
        raise ValueError("tune needs at least one example, got none")
    parameters = generator.begin_tuning(settings.rank, settings.alpha, seed_for(seed, "adapter"))
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    result = TuningResult()
    planned = plan(examples, settings, generator.settings.steps, steps_rule=steps_rule, seed=seed)
    for update, (window, step, batch) in enumerate(planned):
        optimiser.zero_grad(set_to_none=True)
        terms: dict[str, float] = {}
        if settings.draws:
            terms |= _image_terms(generator, batch, step, settings, seed_for(seed, "noise", update))
        if settings.beta_ldm > 0:
            terms["ldm"] = _denoising_term(generator, batch, window, settings, seed_for(seed, "ldm", update))
        weighted = sum(weight * terms[name] for name, weight in settings.weights.items() if name in terms)
        terms["loss"] = weighted + terms.pop("anchor", 0.0)
        terms["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, settings.clip))
        _record(result, terms, update, step)
        optimiser.step()
        if progress is not None:
            progress(update + 1, settings.updates)
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise TuningError("tuning diverged at its last update; lower tuning.learning_rate")
    return result


def _image_terms(
    generator: StableDiffusion, batch: Sequence[TuningExample], step: int, settings: TuningSettings, seed: int
) -> dict[str, float]:
    """Backward of beta_p L_P + beta_c L_C through one step; the unweighted terms and statistics."""
    device, size = generator.device, settings.size
    positive = _resized(torch.stack([example.positive for example in batch]).to(device), size)
    negatives = [positive[:0]] * len(batch)
    if settings.beta_c > 0:
        negatives = [_resized(example.negatives.to(device), size) for example in batch]
    seen: dict[str, list[Tensor]] = {}

    def image_loss(images: Tensor, part: slice) -> Tensor:
        found = similarities(_resized(images, size), positive[part], negatives[part])
        terms = {"perceptual": perceptual(found, settings.loss_sign)}
        measured = {"ssim_positive": found.positive}
        if settings.beta_c > 0:
            terms["contrastive"] = contrastive(found, settings.lam, settings.margin, settings.loss_sign)
            measured["ssim_negative"] = found.negative
        for name, values in (terms | measured).items():
            seen.setdefault(name, []).append(values.detach())
        return torch.stack([settings.weights[name] * values for name, values in terms.items()]).sum(0)

    prompts = [example.prompt for example in batch]
    seeds = [seed_for(seed, position, example.seed) for position, example in enumerate(batch)]
    drawn = one_step_gradient(
        generator, prompts, seeds, step, image_loss, coef_mode=settings.coef, anchor=settings.anchor
    )
    means = {name: _mean(torch.cat(values)) for name, values in seen.items()}
    return {**means, "contrast": _mean(drawn.images.flatten(1).std(dim=1)), "anchor": drawn.anchor}


def _denoising_term(
    generator: StableDiffusion,
    batch: Sequence[TuningExample],
    window: Window,
    settings: TuningSettings,
    seed: int,
) -> float:
    """Backward of beta_ldm L_LDM; the unweighted term."""
    rng = torch_generator(seed)
    latents = generator.encode(torch.stack([example.positive for example in batch]))
    n_train = generator.scheduler.config.num_train_timesteps
    chain = timesteps_of(generator.scheduler, generator.settings.steps).tolist()
    allowed = timestep_range(window, chain, settings.border, n_train)
    timesteps = torch.randint(allowed.start, allowed.stop, (len(batch),), generator=rng).to(generator.device)
    noise = torch.randn(latents.shape, generator=rng).to(latents)
    context = generator.encode_prompts([example.prompt for example in batch])
    loss = denoising_loss(generator.unet, generator.scheduler, latents, context, timesteps, noise)
    (settings.beta_ldm * loss).backward()
    return float(loss.detach())


def plan(
    examples: Sequence[TuningExample],
    settings: TuningSettings,
    n_steps: int,
    *,
    steps_rule: StepsRule,
    seed: int,
) -> Iterator[tuple[Window, int, list[TuningExample]]]:
    """For each update a window, a step k of it, and a batch of examples that share the window.

    A window comes in proportion to its examples; within it all examples come before one comes again.
    """
    groups: dict[Window, list[TuningExample]] = {}
    for example in examples:
        groups.setdefault(window_of(steps_rule, example.level), []).append(example)
    windows = [window for window, members in groups.items() for _ in members]
    turns = _shuffled(windows, seed, "windows")
    streams = {window: _shuffled(members, seed, window) for window, members in groups.items()}
    for update in range(settings.updates):
        window = next(turns)
        step = draw_step(window, n_steps, settings.border, torch_generator(seed, "step", update))
        yield window, step, [next(streams[window]) for _ in range(settings.batch)]


def _shuffled(items: Sequence[Item], seed: int, name: str) -> Iterator[Item]:
    """Endless: all items in a new random order, again and again."""
    rng = torch_generator(seed, "order", name)
    while True:
        for i in torch.randperm(len(items), generator=rng).tolist():
            yield items[i]


def _record(result: TuningResult, terms: dict[str, float], update: int, step: int) -> None:
    if bad := {name: value for name, value in terms.items() if not math.isfinite(value)}:
        raise TuningError(
            f"tuning diverged at update {update} (step {step}): {bad}; "
            "lower tuning.learning_rate or raise tuning.anchor"
        )
    for name, value in terms.items():
        result.series.setdefault(name, []).append(value)
    result.steps_drawn.append(step)


def _resized(images: Float[Tensor, "n 3 h w"], size: int | None) -> Float[Tensor, "n 3 s s"]:
    if size is None or images.shape[-1] == size:
        return images
    if len(images) == 0:
        return images.new_zeros(0, 3, size, size)
    return functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _mean(values: Tensor) -> float:
    """The mean; 0 of nothing."""
    return float(values.mean()) if len(values) else 0.0
