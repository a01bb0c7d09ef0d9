"""Tiny random checkpoints of every kind that ``tasks.diffusion.checkpoint`` reads or refuses, saved as programs do."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SD1: dict[str, Any] = {"attention_head_dim": 8}
SD2: dict[str, Any] = {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True}


def pipeline_like(family: str, words: CLIPTokenizer, **unet_changes: object) -> StableDiffusionPipeline:
    """The components that the family 1.x (noise) or 2.x (velocity) has, a few thousand weights each.

    Args:
        family: ``1.x`` or ``2.x``.
        words: a tokenizer.
        unet_changes: arguments of the noise predictor that differ.
    """
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if family == "1.x" else "gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        norm_num_groups=32,
        latent_channels=4,
        sample_size=16,
    )
    unet: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        **(SD1 if family == "1.x" else SD2),
        **unet_changes,
    }
    noise = PNDMScheduler(skip_prk_steps=True, **SCHEDULE)
    velocity = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **SCHEDULE)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=words,
        unet=UNet2DConditionModel(**unet),
        scheduler=noise if family == "1.x" else velocity,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


# ---------------------------------------------------------------------------------------- the original layout


def save_original(pipeline: StableDiffusionPipeline, file: Path) -> None:
    """One file with the names and shapes of the original programs; the text encoder CLIP's or OpenCLIP's by family."""
    weights = {f"model.diffusion_model.{k}": v for k, v in unet_weights(pipeline.unet).items()}
    weights |= {f"first_stage_model.{k}": v for k, v in vae_weights(pipeline.vae).items()}
    if pipeline.text_encoder.config.hidden_act == "quick_gelu":
        weights |= {
            f"cond_stage_model.transformer.text_model.{k.removeprefix('text_model.')}": v
            for k, v in pipeline.text_encoder.state_dict().items()
        }
    else:
        weights |= {
            f"cond_stage_model.model.{k}": v for k, v in open_clip_weights(pipeline.text_encoder).items()
        }
    weights["model_ema.decay"] = torch.tensor(0.999)  # what training leaves in such files
    save_file({name: weight.contiguous().clone() for name, weight in weights.items()}, file)


def unet_weights(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Blocks are counted through: in the original every residual block, and every change of side, has a number."""
    layers, n = unet.config.layers_per_block, len(unet.config.block_out_channels)
    names = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    names |= {f"time_embedding.linear_{i + 1}": f"time_embed.{2 * i}" for i in range(2)}
    names |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    names |= {"mid_block.resnets.1": "middle_block.2"}
    for block in range(n):
        for layer in range(layers):
            number = block * (layers + 1) + layer + 1
            names[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{number}.0"
            names[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
        names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{(block + 1) * (layers + 1)}.0.op"
        for layer in range(layers + 1):
            number = block * (layers + 1) + layer
            names[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            names[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
        attends = hasattr(unet.up_blocks[block], "attentions")
        last = block * (layers + 1) + layers
        names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{last}.{2 if attends else 1}.conv"
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    return _renamed(unet.state_dict(), names, {"resnets": inner})


def vae_weights(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The decoder's blocks are counted from the finest; attention is made of 1 x 1 convolutions."""
    n, names = len(vae.config.block_out_channels), {}
    for side in ("encoder", "decoder"):
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        names[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        names |= {f"{side}.mid_block.resnets.{i}": f"{side}.mid.block_{i + 1}" for i in range(2)}
    for i in range(n):
        names[f"encoder.down_blocks.{i}.downsamplers.0"] = f"encoder.down.{i}.downsample"
        names[f"decoder.up_blocks.{i}.upsamplers.0"] = f"decoder.up.{n - 1 - i}.upsample"
        for layer in range(vae.config.layers_per_block + 1):
            names[f"encoder.down_blocks.{i}.resnets.{layer}"] = f"encoder.down.{i}.block.{layer}"
            names[f"decoder.up_blocks.{i}.resnets.{layer}"] = f"decoder.up.{n - 1 - i}.block.{layer}"
    inner = {
        "resnets": {"conv_shortcut": "nin_shortcut"},
        "attentions": {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
    }
    weights = _renamed(vae.state_dict(), names, inner)
    return {k: v[:, :, None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in weights.items()}


def open_clip_weights(text_encoder: CLIPTextModel) -> dict[str, Tensor]:
    """Queries, keys and values are one matrix; and there is one more layer, which the family 2.x does not use."""
    weights = {k.removeprefix("text_model."): v for k, v in text_encoder.state_dict().items()}
    made = {
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    parts |= {"self_attn.out_proj": "attn.out_proj"}
    for layer in range(text_encoder.config.num_hidden_layers):
        old, new = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            joined = [weights[f"{old}.self_attn.{one}_proj.{kind}"] for one in "qkv"]
            made[f"{new}.attn.in_proj_{kind}"] = torch.cat(joined)
            made |= {
                f"{new}.{theirs}.{kind}": weights[f"{old}.{ours}.{kind}"] for ours, theirs in parts.items()
            }
    return made


def _renamed(
    weights: dict[str, Tensor], names: dict[str, str], inner: dict[str, dict[str, str]]
) -> dict[str, Tensor]:
    """Exchange the first part of each name that ``names`` knows, then, by the block's kind, what follows it."""
    made = {}
    for name, weight in weights.items():
        head = max((old for old in names if name.startswith(f"{old}.")), key=len, default="")
        rest = name.removeprefix(f"{head}.") if head else name
        for kind, parts in inner.items():
            if f"{kind}." in head:
                part = next((old for old in parts if rest.startswith(f"{old}.")), None)
                rest = parts[part] + rest.removeprefix(part) if part else rest
        made[f"{names[head]}.{rest}" if head else rest] = weight
    return made
