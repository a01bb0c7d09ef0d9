"""One tuning update: through one step (Eq. 6) against back-propagation through the whole chain.

The whole chain is AlignProp's way: every step of the chain has gradient, each noise prediction is recomputed in
the backward pass (checkpointing) so that memory holds one of them beside the latents, the image loss is the same.
Both draw the same images from the same seeds; an update is their forward and backward pass. Each step costs the
whole chain about four noise predictions (forward, again, and twice that backward) and the project one, with the
adapter added to the weights: where the noise predictor is all that costs time, the ratio is a little over 4.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flows.config import load_config
from tasks.diffusion.generator import StableDiffusion
from tasks.diffusion.sampler import guided_noise, make_scheduler, one_step_gradient
from tasks.similarity.ssim import ssim_distance
from tests.benchmarks.measuring import Call, Plan, Row, at_least, peak_mib

LENGTHS, BATCH = (10, 20, 40), 4
PROMPTS, SEEDS = [f"A picture of a {i}." for i in range(BATCH)], list(range(BATCH))


def rows(plan: Plan) -> Iterator[Row]:
    """Seconds of an update and its memory at 10, 20 and 40 steps."""
    few = Plan(plan.clock, min(plan.rounds, 3), plan.device)
    best = few.race({f"{kind} {n}": MAKERS[kind](n) for n in LENGTHS for kind in MAKERS})
    memory = {f"{kind} {n}": peak_mib(MAKERS[kind], n) for n in LENGTHS for kind in MAKERS}
    least = memory[f"one {LENGTHS[0]}"]
    for n in LENGTHS:
        one, whole = f"one {n}", f"whole {n}"
        growth = memory[one] / least
        yield Row(f"tune_lora, an update of {BATCH} images through one of {n} steps",
                  f"{best[one]:.2f} s, {memory[one]:.0f} MiB", f"{growth:.2f} x memory of {LENGTHS[0]} steps",
                  "<= 1.1 x", growth <= 1.1)  # fmt: skip
        figure = f"{best[whole]:.2f} s, {memory[whole]:.0f} MiB"
        if n == 20:
            yield at_least(f"- through all {n} steps", figure, best[whole] / best[one], 5)
        else:
            yield Row(f"- through all {n} steps", figure, f"{best[whole] / best[one]:.2f} x")


def one_step(n_steps: int) -> Call:
    """The project's update, through the middle step."""
    generator, positive = _generator(n_steps)
    return lambda: one_step_gradient(
        generator, PROMPTS, SEEDS, n_steps // 2,
        lambda images, part: ssim_distance(images, positive[part]), coef_mode="exact",
    )  # fmt: skip


def whole_chain(n_steps: int) -> Call:
    """AlignProp's update: all steps have gradient and are checkpointed."""
    generator, positive = _generator(n_steps)
    unet = generator.unet

    def update() -> None:
        condition = generator.condition(PROMPTS)
        walker = make_scheduler(generator.scheduler.config, "ddim")
        walker.set_timesteps(n_steps)
        x = generator.initial_noise(SEEDS) * walker.init_noise_sigma
        for timestep in walker.timesteps:
            noise = checkpoint(guided_noise, unet, x, timestep, condition, use_reentrant=False)
            x = walker.step(noise, timestep, x, return_dict=False)[0]
        ssim_distance(generator.decode_with_gradient(x), positive).mean().backward()

    return update


MAKERS = {"one": one_step, "whole": whole_chain}


def _generator(n_steps: int) -> tuple[StableDiffusion, Tensor]:
    settings = load_config(["dataset=digits", "method=guided"]).generator
    changed = settings.model_copy(update={"steps": n_steps})
    generator = StableDiffusion.from_settings(changed, torch.device("cpu"))
    generator.begin_tuning(rank=4, alpha=4, seed=0)
    positive = torch.rand(BATCH, 3, settings.size, settings.size, generator=torch.Generator().manual_seed(0))
    return generator, positive
