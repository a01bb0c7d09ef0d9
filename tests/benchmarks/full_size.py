"""Stable Diffusion v1.5's architecture at 512 px with random weights, on a GPU: images per second, memory to tune.

    python -m tests.benchmarks full_size --device cuda

Time and memory do not depend on what the weights are, so none are needed: the configuration is public. Drawing is
measured in bfloat16 with 20 steps and guidance, eager and compiled. A tuning update is measured through one step
and, as AlignProp does it, through all steps with checkpoints (tests/benchmarks/tuning.py); within a prediction both
recompute activations, which AlignProp leaves out: without it the whole chain needs more. Memory is what torch
allocates at its peak, weights included.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from flows.config import load_config
from tasks.diffusion.generator import GeneratorSettings, StableDiffusion
from tasks.diffusion.sampler import make_scheduler
from tests.benchmarks.measuring import Call, Plan, Row
from tests.benchmarks.tuning import inputs, one_step_update, whole_chain_update
from tests.full_size import TEXT, UNET, VAE


@dataclass(frozen=True)
class Scale:
    """A model's sizes, and which batches are drawn and tuned with."""

    name: str
    size: int
    steps: int
    dtype: Literal["float32", "bfloat16"]
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    drawn: tuple[int, ...]
    compiled: tuple[bool, ...]
    tuned: tuple[int, ...]


FULL = Scale(
    name="SD v1.5", size=512, steps=20, dtype="bfloat16", unet=UNET, vae=VAE, text=TEXT,
    drawn=(16, 64), compiled=(False, True), tuned=(1, 4, 8),
)  # fmt: skip

SMALL = Scale(
    name="a small copy of SD v1.5", size=64, steps=2, dtype="float32",
    unet=UNET | {"sample_size": 8, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32,
                 "attention_head_dim": 2, "layers_per_block": 1},
    vae=VAE | {"sample_size": 64, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
    text=TEXT | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    drawn=(2,), compiled=(False,), tuned=(1, 2),
)  # fmt: skip


def rows(plan: Plan, scale: Scale = FULL) -> Iterator[Row]:
    """Images per second and memory of drawing; seconds and memory of an update through one step and all."""
    few = Plan(plan.clock, min(plan.rounds, 3), plan.device)
    label = f"{scale.size} px, {scale.dtype}, {scale.steps} steps"
    for compiled in scale.compiled:
        for batch in scale.drawn:
            measured = _measured(few, _drawing(plan.device, scale, batch, compiled))
            way = "compiled" if compiled else "eager"
            speed = measured and f"{batch / measured[0]:.1f} images/s, {measured[1]:.1f} GiB"
            yield Row(f"regenerate, {scale.name}, {label}, batch {batch}, {way}", speed or "out of memory")
    for batch in scale.tuned:
        generator = model(plan.device, scale, batch)
        generator.begin_tuning(rank=4, alpha=4, seed=0)
        one = _measured(few, one_step_update(generator, batch))
        all_steps = _measured(few, whole_chain_update(generator, batch, checkpoints=True))
        yield Row(f"tune_lora, {scale.name}, {label}, batch {batch}, one step", _figure(one))
        ratio = f"{all_steps[0] / one[0]:.2f} x" if one and all_steps else ""
        yield Row(f"- batch {batch}, all steps, checkpointed", _figure(all_steps), ratio)


def model(device: torch.device, scale: Scale, batch: int, compiled: bool = False) -> StableDiffusion:
    """The architecture with random weights, and the miniature's words in prompts of 77 tokens."""
    settings = _settings(scale, batch, compiled)
    words = CLIPTokenizer.from_pretrained(f"{settings.path}/tokenizer", model_max_length=77)
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    torch.manual_seed(0)
    with torch.device(device):
        parts = {
            "unet": UNet2DConditionModel(**scale.unet),
            "vae": AutoencoderKL(**scale.vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**scale.text, eos_token_id=words.eos_token_id)),
        }
    return StableDiffusion(
        settings,
        device,
        tokenizer=words,
        scheduler=make_scheduler(DDIMScheduler(**schedule).config, "ddim"),
        **{name: part.to(getattr(torch, scale.dtype)) for name, part in parts.items()},
    )


def _settings(scale: Scale, batch: int, compiled: bool) -> GeneratorSettings:
    changes = {
        "size": scale.size,
        "steps": scale.steps,
        "dtype": scale.dtype,
        "batch": batch,
        "compile": compiled,
    }
    return load_config(["dataset=digits", "method=guided"]).generator.model_copy(update=changes)


def _drawing(device: torch.device, scale: Scale, batch: int, compiled: bool) -> Call:
    generator = model(device, scale, batch, compiled)

    def draw() -> None:
        generator.draw(*inputs(batch))
        if generator.batch != batch:  # it halves a batch that does not fit
            raise torch.OutOfMemoryError(f"a batch of {batch} does not fit")

    return draw


def _measured(plan: Plan, call: Call) -> tuple[float, float] | None:
    """Best seconds, and GiB at the peak; None where the memory does not suffice."""
    on_gpu = plan.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(plan.device)
    try:
        seconds = plan.race({"": call})[""]
    except torch.OutOfMemoryError:
        return None
    return seconds, torch.cuda.max_memory_allocated(plan.device) / 2**30 if on_gpu else float("nan")


def _figure(measured: tuple[float, float] | None) -> str:
    return f"{measured[0]:.2f} s, {measured[1]:.1f} GiB" if measured else "out of memory"
