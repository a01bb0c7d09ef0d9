"""One tuning update: through one step (Eq. 6) against back-propagation through the whole chain.

The whole chain is AlignProp's way, as TRL's trainer did it: every step of the chain has gradient and each guided
prediction is recomputed in the backward pass (checkpointing), so that memory holds one of them beside the latents.
Without checkpointing it is quicker and its memory grows with the steps. All three draw the same images from the
same seeds in the same batch with the same guidance and take the same image loss; an update is their forward and
backward pass, without L_LDM, which neither needs. A checkpointed step costs about four predictions (forward, again,
and the backward pass) and a step of the project's chain one, without Python in between (``recording``).
"""

from collections.abc import Callable, Iterator

import torch
from torch.utils.checkpoint import checkpoint

from flows.config import load_config
from tasks.diffusion.generator import StableDiffusion
from tasks.diffusion.recording import OFTEN
from tasks.diffusion.sampler import ImageLoss, guided_noise, make_scheduler, one_step_gradient
from tasks.similarity.ssim import ssim_distance
from tests.benchmarks.measuring import Plan, Row, at_least, peak_mib

Update = Callable[[], float]
"""An update; returns the image loss that it saw."""

LENGTHS, PROMISED_AT, BATCH = (10, 20, 40), 20, 4


def rows(plan: Plan) -> Iterator[Row]:
    """Seconds of an update and its memory at 10, 20 and 40 steps."""
    few = Plan(plan.clock, min(plan.rounds, 3), plan.device)
    calls = {(kind, n): make(n) for n in LENGTHS for kind, make in MAKERS.items()}
    losses = [calls[kind, LENGTHS[0]]() for kind in MAKERS]
    assert max(losses) - min(losses) < 1e-3, f"all draw the same images, but their losses are {losses}"
    best = few.race(calls)
    memory = {key: peak_mib(MAKERS[key[0]], key[1]) for key in calls}
    least = memory["one", LENGTHS[0]]
    for n in LENGTHS:
        growth = memory["one", n] / least
        yield Row(f"tune_lora, an update of {BATCH} images through one of {n} steps",
                  _figure(best["one", n], memory["one", n]), f"{growth:.2f} x memory of {LENGTHS[0]} steps",
                  "<= 1.25 x", growth <= 1.25)  # fmt: skip
        for kind, what in (("checkpointed", "checkpointed"), ("whole", "all activations kept")):
            figure, ratio = _figure(best[kind, n], memory[kind, n]), best[kind, n] / best["one", n]
            name = f"- through all {n} steps, {what}"
            promised = n == PROMISED_AT and kind == "checkpointed"
            yield at_least(name, figure, ratio, 5) if promised else Row(name, figure, f"{ratio:.2f} x")


def _figure(seconds: float, mib: float) -> str:
    return f"{seconds:.2f} s, {mib:.0f} MiB"


def one_step(n_steps: int) -> Update:
    """The project's update, through the middle step, once its predictions are recorded."""
    generator = _generator(n_steps)
    for _ in range(OFTEN // n_steps + 1):
        generator.sample_latents(*inputs(BATCH))
    return one_step_update(generator, BATCH)


def checkpointed(n_steps: int) -> Update:
    """AlignProp's update: all steps have gradient and are checkpointed."""
    return whole_chain_update(_generator(n_steps), BATCH, checkpoints=True)


def whole(n_steps: int) -> Update:
    """The same with all activations kept."""
    return whole_chain_update(_generator(n_steps), BATCH, checkpoints=False)


MAKERS = {"one": one_step, "checkpointed": checkpointed, "whole": whole}


def one_step_update(generator: StableDiffusion, batch: int) -> Update:
    """Images, their loss, and its gradient through the middle step."""
    loss = _image_loss(generator, batch)

    def update() -> float:
        step = generator.settings.steps // 2
        return float(
            one_step_gradient(generator, *inputs(batch), step, loss, coef_mode="exact").losses.mean()
        )

    return update


def whole_chain_update(generator: StableDiffusion, batch: int, *, checkpoints: bool) -> Update:
    """Images, their loss, and its gradient through every step."""
    loss = _image_loss(generator, batch)
    prompts, seeds = inputs(batch)

    def update() -> float:
        condition = generator.condition(prompts)
        walker = make_scheduler(generator.scheduler.config, generator.settings.scheduler)
        walker.set_timesteps(generator.settings.steps)
        x = generator.initial_noise(seeds) * walker.init_noise_sigma
        for timestep in walker.timesteps:
            given = (generator.unet, x, timestep, condition)
            noise = (
                checkpoint(guided_noise, *given, use_reentrant=False) if checkpoints else guided_noise(*given)
            )
            x = walker.step(noise, timestep, x, return_dict=False)[0]
        found = loss(generator.decode_with_gradient(x), slice(0, batch)).mean()
        found.backward()
        return float(found.detach())

    return update


def inputs(batch: int) -> tuple[list[str], list[int]]:
    """Prompts and seeds of a batch."""
    return [f"A picture of a {i % 10}." for i in range(batch)], list(range(batch))


def _image_loss(generator: StableDiffusion, batch: int) -> ImageLoss:
    side, rng = generator.settings.size, torch.Generator().manual_seed(0)
    positive = torch.rand(batch, 3, side, side, generator=rng).to(generator.device)
    return lambda images, part: ssim_distance(images, positive[part])


def _generator(n_steps: int) -> StableDiffusion:
    settings = load_config(["dataset=digits", "method=guided"]).generator
    changed = settings.model_copy(update={"steps": n_steps})
    generator = StableDiffusion.from_settings(changed, torch.device("cpu"))
    generator.begin_tuning(rank=4, alpha=4, seed=0)
    return generator
