"""Checkpoints of every kind, saved here in the same format: each draws, and each is tuned by a step."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.diffusion import adapters
from tasks.diffusion.checkpoint import Source, weights_digest
from tasks.diffusion.generator import GeneratorSettings, StableDiffusion
from tasks.diffusion.losses import denoising_loss
from tasks.diffusion.sampler import one_step_gradient, sample_chain
from tests.diffusion.checkpoints import pipeline_like, save_original
from tests.diffusion.conftest import awaken, tokenizer

CPU = torch.device("cpu")
FAMILIES = ["1.x", "2.x"]
PROMPTS, SEEDS = ["a bird", "a fish"], [4, 5]


@dataclass(frozen=True)
class Saved:
    """The same weights in diffusers' format, as one file, and that file's configuration folder."""

    folder: Path
    file: Path
    config: Path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    made = {}
    for family in FAMILIES:
        root = tmp_path_factory.mktemp("saved")
        pipeline = pipeline_like(family, tokenizer(root / "words"))
        pipeline.save_pretrained(root / "folder")
        save_original(pipeline, root / "model.safetensors")
        shutil.copytree(root / "folder", root / "config", ignore=shutil.ignore_patterns("*.safetensors"))
        made[family] = Saved(root / "folder", root / "model.safetensors", root / "config")
    return made


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Any attempt to look a host up is noted and fails."""
    asked: list[str] = []

    def refuse(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        raise OSError("no network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return asked


def settings_of(path: Path | str, **changes: object) -> GeneratorSettings:
    values = {
        "path": str(path),
        "revision": None,
        "size": 16,
        "steps": 4,
        "guidance": 2.0,
        "scheduler": "ddim",
        "batch": 2,
        "dtype": "float32",
        "negative_prompt": "",
    }
    return GeneratorSettings.model_validate(values | changes)


def opened(path: Path | str, **changes: object) -> StableDiffusion:
    return StableDiffusion.from_settings(settings_of(path, **changes), CPU)


def theirs(folder: Path) -> Tensor:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, use_safetensors=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        PROMPTS,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        num_inference_steps=4,
        guidance_scale=2.0,
        height=16,
        width=16,
        output_type="pt",
    ).images


def brightness(images: Tensor, _: slice) -> Tensor:
    return images.square().mean((1, 2, 3))


# ---------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_draws_what_diffusers_draws_and_learns_in_one_step(
    saved: dict[str, Saved], family: str
) -> None:
    generator = opened(saved[family].folder)
    assert generator.scheduler.config.prediction_type == {"1.x": "epsilon", "2.x": "v_prediction"}[family]
    images = generator.draw(PROMPTS, SEEDS)
    assert torch.allclose(images, theirs(saved[family].folder), atol=1e-4)
    assert images.std() > 0.01
    parameters = generator.begin_tuning(2, 2.0, seed=0)
    before = one_step_gradient(generator, PROMPTS, SEEDS, 1, brightness, coef_mode="exact")
    torch.optim.SGD(parameters, lr=20.0).step()
    after = generator.draw(PROMPTS, SEEDS)
    assert brightness(after, slice(None)).mean() < before.losses.mean(), "the step descends"


@pytest.mark.parametrize("step", [0, 2])
def test_one_step_gradient_of_a_velocity_is_autograds(saved: dict[str, Saved], step: int) -> None:
    """Against autograd through a chain written out with the velocity's own formulas."""
    generator = opened(saved["2.x"].folder)
    parameters = generator.begin_tuning(2, 2.0, seed=0)
    awaken(parameters)
    one_step_gradient(generator, PROMPTS, SEEDS, step, brightness, coef_mode="exact")
    ours = [parameter.grad.clone() for parameter in parameters]
    generator.unet.zero_grad()
    condition = generator.condition(PROMPTS)
    context = torch.cat([condition.null.expand_as(condition.prompts), condition.prompts])
    alphas = generator.scheduler.alphas_cumprod
    x, times = generator.initial_noise(SEEDS), [751, 501, 251, 1]
    for k, (now, then) in enumerate(zip(times, [*times[1:], 0], strict=True)):
        with torch.set_grad_enabled(k == step):
            null, told = generator.unet(torch.cat([x, x]).detach(), now, context).sample.chunk(2)
        v = null + 2.0 * (told - null)
        a, s = alphas[now].sqrt(), (1 - alphas[now]).sqrt()
        clean, noise = a * x - s * v, a * v + s * x
        x = alphas[then].sqrt() * clean + (1 - alphas[then]).sqrt() * noise
    brightness(generator.decode_with_gradient(x), slice(None)).mean().backward()
    for mine, parameter in zip(ours, parameters, strict=True):
        assert torch.allclose(mine, parameter.grad, rtol=1e-3, atol=1e-8)


def test_the_denoising_loss_of_a_velocity_compares_velocities(saved: dict[str, Saved]) -> None:
    """Salimans & Ho 2022: v = sqrt(a) noise - sqrt(1 - a) latents. A model that predicts it has no loss."""
    generator = opened(saved["2.x"].folder)
    rng = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 4, 8, 8, generator=rng)
    times = torch.tensor([10, 700])
    alpha = generator.scheduler.alphas_cumprod[times].view(-1, 1, 1, 1)
    context = generator.encode_prompts(PROMPTS)

    def knows(x: Tensor, *_: object, **__: object) -> tuple[Tensor]:
        assert torch.allclose(x, alpha.sqrt() * latents + (1 - alpha).sqrt() * noise)
        return (alpha.sqrt() * noise - (1 - alpha).sqrt() * latents,)

    assert denoising_loss(knows, generator.scheduler, latents, context, times, noise) == 0
    assert denoising_loss(generator.unet, generator.scheduler, latents, context, times, noise) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_is_the_same_generator_without_a_network(
    saved: dict[str, Saved], family: str, no_network: list[str]
) -> None:
    place = saved[family]
    folder, file = opened(place.folder), opened(place.file, config=str(place.config))
    for part in ("unet", "vae", "text_encoder"):
        mine, other = (getattr(generator, part).state_dict() for generator in (file, folder))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in other), part
    assert torch.equal(file.draw(PROMPTS, SEEDS), folder.draw(PROMPTS, SEEDS))
    file.begin_tuning(2, 2.0, seed=0)
    one_step_gradient(file, PROMPTS, SEEDS, 3, brightness, coef_mode="unit")
    assert max(parameter.grad.abs().max() for parameter in adapters.trainable(file.unet)) > 0
    assert no_network == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_and_variants_are_read(
    saved: dict[str, Saved], tmp_path: Path, dtype: torch.dtype
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        saved["1.x"].folder, dtype=dtype, safety_checker=None, use_safetensors=True
    )
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    assert not (tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    found = opened(tmp_path / "half")
    assert found.unet.dtype == torch.float32
    images = found.draw(PROMPTS, SEEDS)
    assert (images - opened(saved["1.x"].folder).draw(PROMPTS, SEEDS)).abs().mean() < 0.02
    assert torch.equal(opened(tmp_path / "half", variant="fp16").draw(PROMPTS, SEEDS), images)
    with pytest.raises(ValueError, match=r"cannot load generator\.path"):
        opened(tmp_path / "half", variant="ema")


def test_a_half_single_file_is_read(saved: dict[str, Saved], tmp_path: Path) -> None:
    place = saved["1.x"]
    half = {name: weight.half() for name, weight in load_file(place.file).items()}
    save_file(half, tmp_path / "half.safetensors")
    images = opened(tmp_path / "half.safetensors", config=str(place.config)).draw(PROMPTS, SEEDS)
    assert (images - opened(place.folder).draw(PROMPTS, SEEDS)).abs().mean() < 0.02


def test_in_half_precision_it_draws_and_learns(saved: dict[str, Saved]) -> None:
    generator = opened(saved["1.x"].folder, dtype="bfloat16")
    images = generator.draw(PROMPTS, SEEDS)
    assert images.dtype == torch.float32
    assert (images - opened(saved["1.x"].folder).draw(PROMPTS, SEEDS)).abs().mean() < 0.05
    parameters = generator.begin_tuning(2, 2.0, seed=0)
    one_step_gradient(generator, PROMPTS, SEEDS, 1, brightness, coef_mode="unit")
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert max(parameter.grad.abs().max() for parameter in parameters) > 0


def test_a_chain_of_velocities_ends_at_the_picture_where_the_model_is_right(saved: dict[str, Saved]) -> None:
    """An oracle that knows the picture behind each noisy latent is followed to it, whatever the steps."""
    generator = opened(saved["2.x"].folder, guidance=1.0)
    picture = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    alphas = generator.scheduler.alphas_cumprod

    class Oracle:
        dtype = torch.float32

        def modules(self) -> Iterator[torch.nn.Module]:
            return iter(())

        def __call__(self, x: Tensor, timestep: Tensor, *_: object, **__: object) -> tuple[Tensor]:
            a, s = alphas[timestep].sqrt(), (1 - alphas[timestep]).sqrt()
            return ((a * x - picture) / s,)

    chain = sample_chain(
        Oracle(), generator.scheduler, 4, generator.initial_noise(SEEDS), generator.condition(PROMPTS)
    )
    last = alphas[0]
    noise = generator.initial_noise(SEEDS)
    assert torch.allclose(chain.latents, last.sqrt() * picture, atol=4 * float((1 - last).sqrt()) + 1e-3)
    assert (chain.latents - picture).abs().mean() < 0.1 * (noise - picture).abs().mean()


# ---------------------------------------------------------------------------------------- what is refused


def test_sdxl_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    (tmp_path / "xl").mkdir()
    (tmp_path / "xl" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionXLPipeline"})
    )
    save_file({"conditioner.embedders.0.transformer.x": torch.zeros(1)}, tmp_path / "xl.safetensors")
    for refused in (weights_digest, lambda source: opened(source.path)):
        with pytest.raises(ValueError, match=r"is a StableDiffusionXLPipeline; .* 1\.x and 2\.x families"):
            refused(Source(path=str(tmp_path / "xl")))
        with pytest.raises(ValueError, match=r"xl\.safetensors' is a checkpoint of SDXL; .* 1\.x and 2\.x"):
            refused(Source(path=str(tmp_path / "xl.safetensors")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_channels": 9}, "takes 9 channels of 4 .* paints into pictures"),
        ({"num_class_embeds": 3}, r"wants more than a text \(num_class_embeds\)"),
    ],
)
def test_other_uses_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    pipeline_like("1.x", tokenizer(tmp_path / "words"), **changes).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "other")


def test_bad_paths_are_named(saved: dict[str, Saved], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        opened(tmp_path)
    for missing in (tmp_path / "missing", tmp_path / "missing.safetensors", "models/sd.safetensors"):
        with pytest.raises(ValueError, match="does not exist"):
            opened(missing)
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"is no \.safetensors file"):
        opened(tmp_path / "model.ckpt")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678 damaged")
    with pytest.raises(ValueError, match=r"cannot read generator\.path"):
        opened(tmp_path / "bad.safetensors")
    save_file({"lora.up": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match="is no whole checkpoint"):
        opened(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"generator\.config=.* holds no model_index\.json"):
        opened(saved["1.x"].file, config=str(tmp_path))
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ValueError, match="does not describe a pipeline"):
        opened(tmp_path)


def test_only_safetensors_are_read(saved: dict[str, Saved], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved["1.x"].folder, copy)
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot load generator\.path"):
        opened(copy)


def test_without_a_network_one_sentence_says_what_to_do(
    saved: dict[str, Saved], no_network: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for ask in (weights_digest, lambda source: opened(source.path)):
        with pytest.raises(
            ValueError, match=r"'owner/name' is not on this machine .* by generator\.path="
        ) as told:
            ask(Source(path="owner/name"))
        assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=r"holds weights only: give a folder .* by generator\.config="):
        opened(saved["1.x"].file)
    assert no_network


# ---------------------------------------------------------------------------------------- the hub's cache, digests


@pytest.fixture
def hub(saved: dict[str, Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A hub's cache with ``owner/name`` in it, at a commit; called, it gets another commit as its main branch."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--name"

    def add(commit: str) -> None:
        shutil.copytree(saved["1.x"].folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)

    add("a" * 40)
    return add


def test_a_hubs_model_that_is_on_this_machine_needs_no_network(
    saved: dict[str, Saved], hub: Callable[[str], None], no_network: list[str]
) -> None:
    images = opened(saved["1.x"].folder).draw(PROMPTS, SEEDS)
    assert torch.equal(opened("owner/name").draw(PROMPTS, SEEDS), images)
    assert weights_digest(Source(path="owner/name")) == f"hub:owner/name@{'a' * 40}"
    hub("b" * 40)
    assert weights_digest(Source(path="owner/name")) == f"hub:owner/name@{'b' * 40}"
    assert weights_digest(Source(path="owner/name", revision="a" * 40)) == f"hub:owner/name@{'a' * 40}"


def test_digests_follow_the_files(saved: dict[str, Saved], tmp_path: Path) -> None:
    place, copy = saved["1.x"], tmp_path / "copy"
    shutil.copytree(place.folder, copy)
    assert weights_digest(Source(path=str(copy))) == weights_digest(Source(path=str(place.folder)))
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")
    assert weights_digest(Source(path=str(copy))) != weights_digest(Source(path=str(place.folder)))
    with_config, other = (
        weights_digest(Source(path=str(place.file), config=str(folder))) for folder in (place.config, copy)
    )
    assert with_config != other, "another noise schedule is another generator"
    assert with_config == weights_digest(Source(path=str(place.file), config=str(place.folder)))
    assert weights_digest(Source(path=str(place.file))) == with_config.partition("+")[0]
