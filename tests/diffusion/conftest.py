"""A Stable Diffusion of few random weights in diffusers' format: images of 16 px, latents of 2 x 8 x 8."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tasks.diffusion.generator import GeneratorSettings, StableDiffusion
from tasks.diffusion.sampler import make_scheduler

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer(folder: Path) -> CLIPTokenizer:
    """One token for each character."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), BEGIN, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token=END)


def pipeline(folder: Path) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    words = tokenizer(folder)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=2,
        sample_size=16,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    schedule = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=unet,
        scheduler=schedule,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that ``StableDiffusionPipeline.from_pretrained`` loads."""
    folder = tmp_path_factory.mktemp("tiny")
    pipeline(folder / "words").save_pretrained(folder / "generator")
    return folder / "generator"


@pytest.fixture(scope="session")
def settings(weights: Path) -> GeneratorSettings:
    return GeneratorSettings(
        path=str(weights),
        revision=None,
        size=16,
        steps=6,
        guidance=2.0,
        scheduler="ddim",
        batch=3,
        dtype="float32",
        negative_prompt="",
    )


@pytest.fixture(scope="session")
def loaded(settings: GeneratorSettings) -> StableDiffusion:
    """Read from disk once; nobody changes it."""
    return StableDiffusion.from_settings(settings, torch.device("cpu"))


@pytest.fixture
def build(settings: GeneratorSettings, loaded: StableDiffusion) -> Callable[..., StableDiffusion]:
    """A fresh generator, with some settings changed."""

    def make(**changes: object) -> StableDiffusion:
        changed = settings.model_copy(update=changes)
        if {"path", "dtype"} & set(changes):
            return StableDiffusion.from_settings(changed, torch.device("cpu"))
        return StableDiffusion(
            changed,
            torch.device("cpu"),
            vae=copy.deepcopy(loaded.vae),
            unet=copy.deepcopy(loaded.unet),
            text_encoder=loaded.text_encoder,
            tokenizer=loaded.tokenizer,
            scheduler=make_scheduler(loaded.scheduler.config, changed.scheduler),
        )

    return make


def awaken(parameters: list[torch.nn.Parameter], size: float = 0.1) -> None:
    """Give an adapter something to do: B is zero when it is new."""
    rng = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.data += size * torch.randn(parameter.shape, generator=rng, dtype=parameter.dtype)
