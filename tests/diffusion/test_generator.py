"""The generator against diffusers' own pipeline; batches, prompts, loading."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from torch import Tensor

from tasks.diffusion.generator import StableDiffusion
from tasks.diffusion.sampler import make_scheduler

Build = Callable[..., StableDiffusion]

PROMPTS = ["A picture of a seven", "a die, five dots", "XIV"]
SEEDS = [3, 2**62 + 1, 77]


def theirs(weights: Path, scheduler: str, seeds: Sequence[int] = SEEDS, **arguments: object) -> Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(weights, safety_checker=None, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if scheduler == "dpmsolver++":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    images = pipe(
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        num_inference_steps=6,
        height=16,
        width=16,
        output_type="pt",
        **arguments,
    ).images
    return images


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize(("guidance", "negative"), [(2.0, ""), (5.0, "blurred"), (1.0, "")])
def test_images_equal_the_pipelines_own(
    build: Build, weights: Path, scheduler: str, guidance: float, negative: str
) -> None:
    ours = build(scheduler=scheduler, guidance=guidance, negative_prompt=negative).draw(PROMPTS, SEEDS)
    other = theirs(
        weights, scheduler, prompt=PROMPTS, guidance_scale=guidance, negative_prompt=[negative] * len(PROMPTS)
    )
    assert torch.allclose(ours, other, atol=1e-5)
    assert ours.std() > 0.01


def test_a_batch_that_is_filled_up_is_the_pipelines_batch_of_that_shape(build: Build, weights: Path) -> None:
    prompts, seeds = [*PROMPTS, "IV", "two dots"], [*SEEDS, 8, 9]
    ours = build(batch=3).draw(prompts, seeds)
    other = theirs(
        weights, "ddim", seeds=[8, 9, 9], prompt=["IV", "two dots", "two dots"], guidance_scale=2.0
    )
    assert torch.allclose(ours[3:], other[:2], atol=1e-5)


def test_an_image_does_not_depend_on_how_many_are_drawn(build: Build) -> None:
    generator = build(batch=4)
    prompts, seeds = [f"picture {i}" for i in range(9)], list(range(9))
    images = generator.draw(prompts, seeds)
    assert images.shape == (9, 3, 16, 16)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    for n in (1, 3, 4, 6):
        assert torch.equal(generator.draw(prompts[:n], seeds[:n]), images[:n])
    assert torch.equal(build(batch=4).draw(prompts, seeds), images)
    assert generator.draw([], []).shape == (0, 3, 16, 16)


def test_prompt_and_seed_both_matter(build: Build) -> None:
    images = build().draw(["one", "two", "one"], [1, 1, 2])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_noise_of_an_image_is_its_seeds_alone(build: Build) -> None:
    generator = build()
    assert torch.equal(generator.initial_noise([5, 6, 7])[1:2], generator.initial_noise([6]))


def test_a_chain_keeps_the_latents_asked_for(build: Build) -> None:
    generator = build()
    chain = generator.sample_latents(PROMPTS, SEEDS, keep_step=[0, 4])
    assert sorted(chain.kept) == [0, 4]
    assert torch.equal(chain.kept[0][0], generator.initial_noise(SEEDS))
    assert chain.kept[0][1] > chain.kept[4][1]
    with pytest.raises(ValueError, match="steps 0 to 5"):
        generator.sample_latents(PROMPTS, SEEDS, keep_step=[6])


def test_autoencoder_in_parts_equals_the_whole(build: Build) -> None:
    generator = build()
    images = generator.draw(PROMPTS, SEEDS)
    latents = generator.encode(images)
    assert latents.shape == (3, 2, 8, 8)
    reference = generator.vae.encode(images * 2 - 1).latent_dist.mean * generator.vae.config.scaling_factor
    assert torch.allclose(latents, reference, atol=1e-6)
    assert torch.allclose(generator.decode(latents, chunk=1), generator.decode(latents), atol=1e-6)


def test_tokens_are_counted_with_both_marks_and_long_prompts_are_cut(build: Build) -> None:
    generator = build()
    assert generator.token_count("abc") == 5
    assert generator.token_count("") == 2
    assert generator.fits("a" * 75)
    assert not generator.fits("a" * 76)
    assert generator.encode_prompts(["a" * 300]).shape == (1, 77, 16)
    assert torch.equal(generator.encode_prompts(["a" * 300]), generator.encode_prompts(["a" * 400]))


def test_prompts_are_encoded_once_and_alone(build: Build) -> None:
    generator = build()
    together = generator.encode_prompts(["one", "two", "one"])
    assert torch.equal(together[0], together[2])
    assert torch.equal(build().encode_prompts(["two"]), together[1:2])


def test_parts_are_frozen(build: Build) -> None:
    generator = build()
    for part in (generator.vae, generator.unet, generator.text_encoder):
        assert not part.training
        assert not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++"])
def test_schedulers_keep_the_pipelines_own_noise_schedule(name: str) -> None:
    sd15 = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    trained = DDIMScheduler(trained_betas=torch.linspace(0.001, 0.02, 50).tolist(), num_train_timesteps=50)
    for original in (sd15, trained):
        made = make_scheduler(original.config, name)
        assert torch.allclose(made.alphas_cumprod, original.alphas_cumprod)
        assert not made.config.get("clip_sample", False)
    with pytest.raises(ValueError, match="'pndm' is unknown"):
        make_scheduler(sd15.config, "pndm")


def test_bad_sizes_and_lists_are_named(build: Build) -> None:
    with pytest.raises(ValueError, match="multiple of 2"):
        build(size=17)
    with pytest.raises(ValueError, match="one seed for each prompt"):
        build().draw(["one"], [])


# ---------------------------------------------------------------------------------------- memory


class Small(torch.nn.Module):
    """A noise predictor on a device whose memory holds so many images at once, both branches of guidance counted."""

    def __init__(self, unet: torch.nn.Module, images: int) -> None:
        super().__init__()
        self.unet, self.images, self.seen = unet, images, []

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.unet, name)

    def forward(self, x: Tensor, *arguments: object, **options: object) -> object:
        self.seen.append(len(x) // 2)
        if len(x) > 2 * self.images:
            raise torch.OutOfMemoryError("too many")
        return self.unet(x, *arguments, **options)


def test_a_batch_that_does_not_fit_is_halved_for_good_and_said(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    generator = build(batch=8)
    generator.unet = small = Small(generator.unet, images=3)
    generator.recorder = None  # as on a GPU
    prompts, seeds = [f"picture {i}" for i in range(5)], list(range(5))
    images = generator.draw(prompts, seeds)
    assert generator.batch == 2
    assert caplog.messages == [
        f"out of memory on cpu: from now on {n} images of 16 x 16 are drawn at once; the record says so"
        for n in (4, 2)
    ]
    assert torch.equal(images, build(batch=2).draw(prompts, seeds)), "all images share the shape that fits"
    small.seen.clear()
    generator.draw(prompts, seeds)
    assert set(small.seen) == {2}, "what does not fit is not tried again"


def test_not_even_one_image_fits(build: Build) -> None:
    generator = build(batch=2)
    generator.unet = Small(generator.unet, images=0)
    generator.recorder = None  # as on a GPU
    with pytest.raises(ValueError, match=r"not even one image of 16 x 16 fits .* lower generator\.size"):
        generator.draw(["one"], [1])


def test_compiling_is_a_setting(build: Build) -> None:
    assert build(compile=True).unet._compiled_call_impl is not None
    assert build().unet._compiled_call_impl is None
