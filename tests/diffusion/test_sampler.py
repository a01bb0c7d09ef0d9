"""The one-step gradient against autograd through the whole frozen chain, and against finite differences."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from tasks.diffusion import adapters
from tasks.diffusion.generator import StableDiffusion
from tasks.diffusion.sampler import (
    Scheduler,
    guided_noise,
    make_scheduler,
    one_step_gradient,
    step_coefficients,
    timesteps_of,
)
from tasks.similarity.ssim import ssim_distance
from tests.diffusion.conftest import awaken

Build = Callable[..., StableDiffusion]
PROMPTS, SEEDS, STEPS = ["one", "two"], [11, 12], 6
SCHEDULERS = pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
TARGET = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def image_loss(images: Tensor, part: slice) -> Tensor:
    return ssim_distance(images.sigmoid(), TARGET[part].to(images.dtype))


def tuned(build: Build, **changes: object) -> tuple[StableDiffusion, list[torch.nn.Parameter]]:
    generator = build(steps=STEPS, **changes)
    parameters = generator.begin_tuning(4, 4, seed=0)
    awaken(parameters)
    return generator, parameters


def gradients(parameters: list[torch.nn.Parameter]) -> Tensor:
    flat = torch.cat([p.grad.flatten() for p in parameters])
    for p in parameters:
        p.grad = None
    return flat


def through_the_chain(
    generator: StableDiffusion, step: int, linear_path: bool = True
) -> tuple[Tensor, list[Tensor]]:
    """Loss with its graph through the whole chain, only step ``step``'s prediction differentiable.

    ``linear_path=False`` is the wrong reading: everything after the step under no_grad.
    """
    walker = make_scheduler(generator.scheduler.config, generator.settings.scheduler)
    walker.set_timesteps(STEPS)
    condition = generator.condition(PROMPTS)
    x = generator.initial_noise(SEEDS)
    predictions = []
    for k, timestep in enumerate(walker.timesteps):
        with torch.set_grad_enabled(k == step):
            prediction = guided_noise(generator.unet, x.detach(), timestep, condition)
        with torch.set_grad_enabled(linear_path or k == step):
            x = walker.step(prediction, timestep, x, return_dict=False)[0]
        predictions.append(prediction.detach())
    with torch.set_grad_enabled(linear_path or step == STEPS - 1):
        loss = image_loss(generator.decode_with_gradient(x), slice(0, 2)).mean()
    return loss, predictions


@SCHEDULERS
@pytest.mark.parametrize("step", range(STEPS))
def test_equals_autograd_through_the_frozen_chain(build: Build, scheduler: str, step: int) -> None:
    generator, parameters = tuned(build, scheduler=scheduler)
    drawn = one_step_gradient(generator, PROMPTS, SEEDS, step, image_loss, coef_mode="exact")
    ours = gradients(parameters)
    loss, _ = through_the_chain(generator, step)
    loss.backward()
    reference = gradients(parameters)
    assert drawn.losses.mean().item() == pytest.approx(loss.item(), rel=1e-5)
    assert reference.norm() > 0
    assert (ours - reference).norm() <= 1e-5 * reference.norm()


@SCHEDULERS
def test_every_step_reaches_the_adapter_even_a_new_one(build: Build, scheduler: str) -> None:
    generator = build(steps=STEPS, scheduler=scheduler)
    generator.begin_tuning(4, 4, seed=0)
    for step in range(STEPS):
        one_step_gradient(generator, PROMPTS, SEEDS, step, image_loss, coef_mode="unit")
        for name, parameter in generator.unet.named_parameters():
            if ".lora_B." in name:
                assert parameter.grad.abs().sum() > 0, (step, name)
            if ".lora_A." in name:
                assert not parameter.grad.abs().any(), "A has no gradient while B is zero"
            parameter.grad = None


@SCHEDULERS
def test_the_wrong_reading_has_no_gradient_before_the_last_step(build: Build, scheduler: str) -> None:
    generator, parameters = tuned(build, scheduler=scheduler)
    for step in range(STEPS - 1):
        loss, _ = through_the_chain(generator, step, linear_path=False)
        assert not loss.requires_grad
        one_step_gradient(generator, PROMPTS, SEEDS, step, image_loss, coef_mode="exact")
        assert gradients(parameters).abs().sum() > 0
    loss, _ = through_the_chain(generator, STEPS - 1, linear_path=False)
    loss.backward()
    last = gradients(parameters)
    one_step_gradient(generator, PROMPTS, SEEDS, STEPS - 1, image_loss, coef_mode="exact")
    assert (gradients(parameters) - last).norm() <= 1e-5 * last.norm()


def dpm_solver(
    scheduler: Scheduler, x: Tensor, predict: Callable[[int, Tensor, Tensor], Tensor], n: int
) -> Tensor:
    """DPM-Solver++(2M) written from its paper's equations, in float64; first and last step of first order."""
    timesteps = timesteps_of(scheduler, n)
    a = scheduler.alphas_cumprod.double()[timesteps]
    alpha, sigma = [*a.sqrt().tolist(), 1.0], [*(1 - a).sqrt().tolist(), 0.0]  # the chain ends without noise
    lam = [*(math.log(x / y) for x, y in zip(alpha[:-1], sigma[:-1], strict=True)), math.inf]
    before = x
    for k in range(n):
        data = (x - sigma[k] * predict(k, x, timesteps[k])) / alpha[k]
        h = lam[k + 1] - lam[k]
        blended = data
        if 0 < k < n - 1:
            blended = data + (data - before) * h / (2 * (lam[k] - lam[k - 1]))
        x, before = sigma[k + 1] / sigma[k] * x - alpha[k + 1] * math.expm1(-h) * blended, data
    return x


@pytest.mark.parametrize(
    ("scheduler", "rel"), [("ddim", 1e-5), ("dpmsolver++", 2e-4)]
)  # diffusers' own is float32
@pytest.mark.parametrize("step", [0, 3, STEPS - 1])
def test_equals_finite_differences_when_only_that_steps_adapter_moves(
    build: Build, scheduler: str, rel: float, step: int
) -> None:
    generator, parameters = tuned(build, scheduler=scheduler)
    for part in (generator.unet, generator.vae):
        part.double()
    generator._encoded = {text: generator.encode_prompts([text]).double() for text in ("", *PROMPTS)}
    noise = generator.initial_noise(SEEDS)
    _, predictions = through_the_chain(generator, step)

    def predict(k: int, x: Tensor, timestep: Tensor) -> Tensor:
        if k != step:
            return predictions[k].double()
        return guided_noise(generator.unet, x, timestep, generator.condition(PROMPTS))

    @torch.no_grad()
    def loss_at() -> float:
        x = noise
        if scheduler == "dpmsolver++":
            x = dpm_solver(generator.scheduler, x, predict, STEPS)
        else:
            walker = make_scheduler(generator.scheduler.config, scheduler)
            walker.set_timesteps(STEPS)
            for k, timestep in enumerate(walker.timesteps):
                x = walker.step(predict(k, x, timestep), timestep, x, return_dict=False)[0]
        return image_loss(generator.decode_with_gradient(x), slice(0, 2)).mean().item()

    one_step_gradient(generator, PROMPTS, SEEDS, step, image_loss, coef_mode="exact")
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(2)).to(p) for p in parameters]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, direction, strict=True))
    ends, size = [], 1e-4
    for sign in (1, -2):
        for p, d in zip(parameters, direction, strict=True):
            p.data += sign * size * d
        ends.append(loss_at())
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * size), rel=rel)


def test_coefficients_of_ddim_are_differences_of_noise_levels() -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    found = step_coefficients(scheduler, 20)
    scheduler.set_timesteps(20)
    alpha = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])
    sigma = ((1 - alpha) / alpha).sqrt()
    scale = 1 / scheduler.final_alpha_cumprod.sqrt()  # x_0 of diffusers keeps the last alpha
    assert torch.allclose(found * scale, sigma[1:] - sigma[:-1], rtol=2e-4)
    assert found.abs().max() / found.abs().min() > 100


def test_coefficients_of_dpm_solver_are_those_of_its_paper(build: Build) -> None:
    """One prediction at a time is set to 1; each enters two updates, so DDIM's differences do not serve."""
    scheduler, n = build(scheduler="dpmsolver++").scheduler, 20
    start = torch.zeros((), dtype=torch.float64)
    ends = [dpm_solver(scheduler, start, lambda k, x, t, i=i: x * 0 + (k == i), n) for i in range(n)]
    assert torch.allclose(step_coefficients(scheduler, n), torch.stack(ends).float(), rtol=2e-4)
    ddim = step_coefficients(build(scheduler="ddim").scheduler, n)
    assert ((ddim / torch.stack(ends) - 1).abs() > 0.02).any()


@pytest.mark.parametrize(
    "kind", [DDIMScheduler, DPMSolverMultistepScheduler, DEISMultistepScheduler, UniPCMultistepScheduler]
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_coefficients_of_any_affine_scheduler_are_its_impulse_responses(kind: type, prediction: str) -> None:
    """The chain is run with one prediction nudged, whatever the scheduler carries from step to step."""
    clip = {"clip_sample": False} if kind is DDIMScheduler else {}  # clipped, it is not affine
    scheduler = kind(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction, **clip
    )
    rng = torch.Generator().manual_seed(0)
    predictions = torch.randn(STEPS, 1, 1, 1, 1, generator=rng, dtype=torch.float64)

    def end(nudged: int | None) -> float:
        walker = copy.deepcopy(scheduler)
        walker.set_timesteps(STEPS)
        x = torch.full((1, 1, 1, 1), 0.3, dtype=torch.float64)
        for k, timestep in enumerate(walker.timesteps):
            x = walker.step(predictions[k] + (k == nudged), timestep, x, return_dict=False)[0].double()
        return x.item()

    responses = [end(k) - end(None) for k in range(STEPS)]
    assert step_coefficients(scheduler, STEPS).tolist() == pytest.approx(responses, rel=2e-3, abs=2e-5)
    assert all(abs(response) > 1e-4 for response in responses)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++"])
def test_a_chain_is_affine_with_these_coefficients(build: Build, name: str) -> None:
    scheduler = build(scheduler=name).scheduler
    coefficients = step_coefficients(scheduler, 20)
    assert torch.isfinite(coefficients).all()
    assert (coefficients != 0).all()
    predictions = torch.randn(20, generator=torch.Generator().manual_seed(0))

    def end(values: Tensor) -> Tensor:
        walker = make_scheduler(scheduler.config, name)
        walker.set_timesteps(20)
        x = torch.full((1, 1, 1, 1), 0.3)
        for value, timestep in zip(values, walker.timesteps, strict=True):
            x = walker.step(value.view(1, 1, 1, 1), timestep, x, return_dict=False)[0]
        return x.flatten()[0]

    change = end(predictions) - end(torch.zeros(20))
    assert change.item() == pytest.approx((coefficients * predictions).sum().item(), rel=1e-3)


def test_unit_mode_keeps_the_direction(build: Build) -> None:
    generator, parameters = tuned(build)
    exact, unit = [], []
    for collected, mode in ((exact, "exact"), (unit, "unit")):
        one_step_gradient(generator, PROMPTS, SEEDS, 4, image_loss, coef_mode=mode)
        collected.append(gradients(parameters))
    ratio = unit[0].norm() / exact[0].norm()
    assert torch.allclose(unit[0], ratio * exact[0], rtol=1e-3, atol=1e-9)
    assert ratio == pytest.approx(1 / step_coefficients(generator.scheduler, STEPS)[4].abs().item(), rel=1e-4)


def test_decoding_in_parts_changes_nothing(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, parameters = tuned(build)
    one_step_gradient(generator, PROMPTS, SEEDS, 2, image_loss, coef_mode="exact")
    whole = gradients(parameters)
    monkeypatch.setattr(type(generator), "gradient_chunk", 1)
    one_step_gradient(generator, PROMPTS, SEEDS, 2, image_loss, coef_mode="exact")
    assert torch.allclose(gradients(parameters), whole, rtol=1e-4, atol=1e-9)


def test_checkpointing_changes_nothing(build: Build) -> None:
    generator, parameters = tuned(build)
    one_step_gradient(generator, PROMPTS, SEEDS, 2, image_loss, coef_mode="exact")
    plain = gradients(parameters)
    generator.unet.enable_gradient_checkpointing()
    generator.vae.enable_gradient_checkpointing()
    one_step_gradient(generator, PROMPTS, SEEDS, 2, image_loss, coef_mode="exact")
    assert torch.allclose(gradients(parameters), plain, rtol=1e-4, atol=1e-9)


def test_anchor_pulls_back_to_the_base_model(build: Build) -> None:
    generator, parameters = tuned(build)

    def no_loss(images: Tensor, part: slice) -> Tensor:
        return images.flatten(1).sum(1) * 0

    drawn = one_step_gradient(generator, PROMPTS, SEEDS, 1, no_loss, coef_mode="exact", anchor=0.5)
    chain = generator.sample_latents(PROMPTS, SEEDS, keep_step=[1])
    x, timestep = chain.kept[1]

    def drift() -> float:
        condition = generator.condition(PROMPTS)
        with torch.no_grad():
            adapted = guided_noise(generator.unet, x, timestep, condition)
            with adapters.disabled(generator.unet):
                base = guided_noise(generator.unet, x, timestep, condition)
        return (adapted - base).square().mean().item()

    before = drift()
    assert drawn.anchor == pytest.approx(0.5 * before, rel=1e-4)
    for p in parameters:
        p.data -= 0.1 * p.grad
    assert drift() < before


def test_drawing_leaves_the_scheduler_as_it_was(build: Build) -> None:
    generator = build(scheduler="dpmsolver++")
    before = timesteps_of(generator.scheduler, 6)
    first = generator.draw(PROMPTS, SEEDS)
    assert torch.equal(timesteps_of(generator.scheduler, 6), before)
    assert torch.equal(generator.draw(PROMPTS, SEEDS), first)


def test_bad_input_is_named(build: Build) -> None:
    generator, _ = tuned(build)
    with pytest.raises(ValueError, match="steps 0 to 5"):
        one_step_gradient(generator, PROMPTS, SEEDS, 6, image_loss, coef_mode="exact")
    with pytest.raises(ValueError, match="n_steps must be 1 to 1000, got 0"):
        timesteps_of(generator.scheduler, 0)
