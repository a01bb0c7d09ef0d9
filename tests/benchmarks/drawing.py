"""Images per second of stage 6 on the miniature: against a loop over StableDiffusionPipeline, and its best batch.

All contenders have the same weights, scheduler, steps and guidance and get the prompts that A_0 has: a sentence
for each class, many images of it. The pipeline's bars are off. Its best batched call is the batch size of ours.
"""

from collections.abc import Iterator

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from flows.config import load_config
from tasks.context import EpochContext
from tasks.diffusion.generator import GeneratorSettings, StableDiffusion
from tasks.records import ArtifactRef, Digest, LoopState
from tasks.shards import Order, Shard, draw_shard, draw_shards
from tests.benchmarks.measuring import Plan, Row, at_least

LOOPED = 4


def rows(plan: Plan) -> Iterator[Row]:
    """Images per second."""
    settings = load_config(["dataset=digits", "method=fixed_sd"]).generator
    generator = StableDiffusion.from_settings(settings, plan.device)
    pipe = _pipeline(generator)
    n = settings.batch
    prompts, seeds = [f"A picture of a {i // 2 % 10}." for i in range(n)], list(range(n))

    def call(texts: list[str], numbers: list[int]) -> Tensor:
        return _pipe_images(pipe, settings, texts, numbers)

    off = (generator.draw(prompts, seeds) - call(prompts, seeds)).abs().max().item()
    best = plan.race(
        {
            "ours": lambda: generator.draw(prompts, seeds),
            "batched": lambda: call(prompts, seeds),
            "looped": lambda: [call(prompts[i : i + 1], seeds[i : i + 1]) for i in range(LOOPED)],
        }
    )
    image = {"ours": best["ours"] / n, "batched": best["batched"] / n, "looped": best["looped"] / LOOPED}
    name = f"regenerate, {settings.size} px, {settings.steps} steps, batch {settings.batch}"
    yield Row(name, f"{1 / image['ours']:.1f} images/s", f"differs by {off:.0e}", "<= 1e-4", off <= 1e-4)
    looped = f"{1 / image['looped']:.1f} images/s"
    yield at_least("- StableDiffusionPipeline, prompt by prompt", looped, image["looped"] / image["ours"], 5)
    batched = f"{1 / image['batched']:.1f} images/s"
    yield at_least("- StableDiffusionPipeline, the same batch", batched, image["batched"] / image["ours"], 1)
    threads = torch.get_num_threads()
    if plan.device.type == "cpu" and threads > 1:
        order = _order()
        shards = [
            Shard(start=i * n, prompts=tuple(prompts), seeds=tuple(seeds), batch=n) for i in range(threads)
        ]
        best = plan.race(
            {
                "beside": lambda: list(draw_shards(order, shards)),
                "after": lambda: [draw_shard(order, shard) for shard in shards],
            }
        )
        speed = f"{threads * n / best['beside']:.1f} images/s"
        yield at_least(
            f"- {threads} batches side by side, against one after another",
            speed,
            best["after"] / best["beside"],
            1,
        )


def _order() -> Order:
    """The miniature's, without an adapter."""
    config = load_config(["dataset=digits", "method=fixed_sd"])
    context = EpochContext(
        run="bench", seed=0, session=0, epoch=0,
        session_ref=ArtifactRef(path="none/0/session.json", digest=Digest("none"), kind="session"),
        start=LoopState(), class_names=("one",), n_base=1, dataset=config.dataset, runtime=config.runtime,
    )  # fmt: skip
    return Order(context=context, generator=config.generator, adapter=None)


def _pipeline(generator: StableDiffusion) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=generator.vae,
        unet=generator.unet,
        text_encoder=generator.text_encoder,
        tokenizer=generator.tokenizer,
        scheduler=DDIMScheduler.from_config(generator.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pipe_images(
    pipe: StableDiffusionPipeline, settings: GeneratorSettings, prompts: list[str], seeds: list[int]
) -> Tensor:
    return pipe(
        prompts,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        height=settings.size,
        width=settings.size,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).images.cpu()
