"""The true architectures with random weights: Stable Diffusion v1.5 and ViT-B/16, in the formats that are published.

Their public configurations, shortened to what is not a default; parameters are counted in ``COUNTS``, so that a slip
shows. The tokenizer alone is a stand-in: its words are not at hand here, and with random weights mean nothing.
"""

from pathlib import Path
from typing import Any

import timm
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VIT = "vit_base_patch16_224.augreg_in21k"
UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
COUNTS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480, "vit": 85_798_656}


def sd15_parts(**text: object) -> dict[str, nn.Module]:
    """Noise predictor, autoencoder and text encoder of Stable Diffusion v1.5, on torch's current device."""
    return {
        "unet": UNet2DConditionModel(**UNET),
        "vae": AutoencoderKL(**VAE),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT, **text)),
    }


def vit_b16() -> nn.Module:
    """The paper's classifier without its head, on torch's current device."""
    return timm.create_model(VIT, num_classes=0)


def save_sd15(folder: Path, words: CLIPTokenizer, device: torch.device) -> None:
    """A folder as on the hub, in bfloat16 (2 GB); weights are drawn on ``device``, which takes seconds on a GPU."""
    marks = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    with device:
        parts = sd15_parts(**marks, pad_token_id=words.pad_token_id)
    pipeline = StableDiffusionPipeline(
        **{name: part.to(torch.bfloat16) for name, part in parts.items()},
        tokenizer=words,
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def save_vit_b16(file: Path, device: torch.device) -> None:
    """A file as timm publishes it, without the head (340 MB)."""
    torch.manual_seed(0)
    with device:
        network = vit_b16()
    save_file({name: weight.cpu() for name, weight in network.state_dict().items()}, file)
