"""LoRA: attached, trained, saved in diffusers' format, loaded by plain diffusers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from tasks.diffusion import adapters
from tasks.diffusion.generator import StableDiffusion
from tests.diffusion.conftest import awaken

Build = Callable[..., StableDiffusion]
PROMPTS, SEEDS = ["one", "two", "three"], [1, 2, 3]


@pytest.fixture
def adapter(build: Build, tmp_path: Path) -> Path:
    generator = build()
    awaken(adapters.attach(generator.unet, 4, 4, seed=0))
    adapters.save(generator.unet, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_new_adapter_changes_nothing_and_follows_its_seed(build: Build) -> None:
    generator, other = build(), build()
    before = generator.draw(PROMPTS, SEEDS)
    state = torch.random.get_rng_state()
    first = adapters.attach(generator.unet, 4, 4, seed=7)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(generator.draw(PROMPTS, SEEDS), before)
    second = adapters.attach(other.unet, 4, 4, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    names = {
        name.split(".lora_")[0].split(".attn")[1][2:]
        for name, p in generator.unet.named_parameters()
        if p.requires_grad
    }
    assert names == set(adapters.TARGETS)


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
def test_a_saved_adapter_loaded_by_plain_diffusers_draws_our_images(
    build: Build, adapter: Path, weights: Path, scheduler: str
) -> None:
    generator = build(scheduler=scheduler)
    base = generator.draw(PROMPTS, SEEDS)
    generator.use_adapter(adapter)
    ours = generator.draw(PROMPTS, SEEDS)
    assert (ours - base).abs().max() > 0.01
    pipe = StableDiffusionPipeline.from_pretrained(weights, safety_checker=None, use_safetensors=True)
    if scheduler == "dpmsolver++":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(adapter)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=6,
        guidance_scale=2.0,
        height=16,
        width=16,
        output_type="pt",
    ).images
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_removing_an_adapter_gives_the_base_images_back(build: Build, adapter: Path) -> None:
    generator = build()
    base = generator.draw(PROMPTS, SEEDS)
    generator.use_adapter(adapter)
    generator.use_adapter(None)
    assert torch.equal(generator.draw(PROMPTS, SEEDS), base)


def test_merging_predicts_the_same_and_gives_the_base_back_bit_for_bit(build: Build, adapter: Path) -> None:
    generator = build()
    generator.use_adapter(adapter)
    before = {name: value.clone() for name, value in generator.unet.state_dict().items()}
    x, context = torch.randn(2, 2, 8, 8), generator.encode_prompts(["one", "two"])

    def predict() -> torch.Tensor:
        with torch.no_grad():
            return generator.unet(x, 500, context, return_dict=False)[0]

    plain = predict()
    with adapters.disabled(generator.unet):
        base = predict()
    with adapters.merged(generator.unet):
        assert torch.allclose(predict(), plain, atol=1e-6)
    assert not torch.allclose(plain, base, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in generator.unet.state_dict().items())
    assert torch.equal(predict(), plain)
    assert all(p.requires_grad for p in adapters.trainable(generator.unet))


def test_bytes_depend_on_the_weights_alone(build: Build, adapter: Path, tmp_path: Path) -> None:
    for name in ("second", "third"):
        generator = build()
        generator.use_adapter(adapter)
        adapters.save(generator.unet, tmp_path / name)
    files = [(tmp_path / name / adapters.FILE).read_bytes() for name in ("second", "third")]
    assert files[0] == files[1] == (adapter / adapters.FILE).read_bytes()


@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_alpha_is_folded_in_on_saving_and_can_be_changed_without_effect(
    build: Build, tmp_path: Path, alpha: float
) -> None:
    generator = build()
    awaken(adapters.attach(generator.unet, 4, alpha, seed=0))
    images = generator.draw(PROMPTS, SEEDS)
    adapters.save(generator.unet, tmp_path)
    generator.use_adapter(tmp_path)
    assert torch.allclose(generator.draw(PROMPTS, SEEDS), images, atol=1e-6)
    adapters.set_alpha(generator.unet, alpha)
    assert torch.allclose(generator.draw(PROMPTS, SEEDS), images, atol=1e-6)


def test_tuned_weights_are_forgotten_when_a_folder_is_asked_for(build: Build, adapter: Path) -> None:
    generator = build()
    generator.use_adapter(adapter)
    images = generator.draw(PROMPTS, SEEDS)
    awaken(generator.begin_tuning(4, 4, seed=0))
    assert not torch.equal(generator.draw(PROMPTS, SEEDS), images)
    generator.use_adapter(adapter)
    assert torch.equal(generator.draw(PROMPTS, SEEDS), images)


def test_adapter_stays_in_float32_on_a_bfloat16_base(build: Build) -> None:
    generator = build(dtype="bfloat16")
    parameters = generator.begin_tuning(2, 2, seed=0)
    assert {p.dtype for p in parameters} == {torch.float32}
    assert generator.unet.dtype == torch.bfloat16
    awaken(parameters)
    assert torch.isfinite(generator.draw(PROMPTS, SEEDS)).all()


def test_bad_input_is_named(build: Build, adapter: Path, tmp_path: Path) -> None:
    generator = build()
    with pytest.raises(ValueError, match="no adapter to save"):
        adapters.save(generator.unet, tmp_path / "none")
    with pytest.raises(ValueError, match="rank >= 1"):
        adapters.attach(generator.unet, 0, 1, seed=0)
    with pytest.raises(ValueError, match="cannot read the adapter"):
        generator.use_adapter(tmp_path / "missing")
    (tmp_path / adapters.FILE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot read the adapter"):
        generator.use_adapter(tmp_path)
    generator.use_adapter(adapter)
    with pytest.raises(ValueError, match="already has an adapter"):
        adapters.attach(generator.unet, 4, 4, seed=0)
    with pytest.raises(ValueError, match=r"has rank 4, but tuning\.rank=2"):
        generator.begin_tuning(2, 2, seed=0)


def test_an_adapter_of_another_model_is_refused(build: Build, adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / adapters.FILE)
    weights.pop(next(iter(weights)))
    save_file(weights, adapter / adapters.FILE)
    generator = build()
    with pytest.raises(ValueError, match="another model"):
        generator.use_adapter(adapter)
    assert not adapters.is_attached(generator.unet)
