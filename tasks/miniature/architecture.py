"""The miniature's models, untrained: the parts of Stable Diffusion, a timm ViT and a captioner, all small.

The noise schedule is a shifted cosine, ``sigma(t) = shift * tan(pi/2 * t * reach)``: an 8 x 8 latent has few
pixels to average over, so that the usual schedule settles the picture's content late; with the shift below 1
the noise falls faster and content is settled in the first half (the paper's premise, section 3.3).
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PretrainedConfig,
    PreTrainedModel,
    VisionEncoderDecoderModel,
)
from transformers.modeling_outputs import BaseModelOutput

TIMESTEPS = 1000
TOKENS = 40
"""Length of a prompt in tokens (Stable Diffusion: 77); the corpus's longest caption has 27."""
SHIFT, SIGMA_MAX = 0.25, 12.0
VIT: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4, "mlp_ratio": 2.0,
    "num_classes": 0, "global_pool": "token",
}  # fmt: skip
"""Arguments of timm's VisionTransformer; ``num_classes=0`` makes it return 128 features."""


def betas(shift: float = SHIFT, sigma_max: float = SIGMA_MAX) -> list[float]:
    """Betas of the shifted cosine, [1000] in (0, 1): alpha_bar(t) = 1 / (1 + sigma(t)^2)."""
    reach = math.atan(sigma_max / shift) / (math.pi / 2)
    t = torch.arange(1, TIMESTEPS + 1, dtype=torch.float64) / TIMESTEPS
    alpha_bar = 1 / (1 + (shift * torch.tan(math.pi / 2 * reach * t)) ** 2)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    return [float(b) for b in 1 - alpha_bar / before]


def scheduler(shift: float = SHIFT) -> DDIMScheduler:
    """DDIM with trailing spacing over the shifted cosine; the chain ends at a clean latent."""
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        trained_betas=betas(shift),
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
        timestep_spacing="trailing",
    )


def vae() -> AutoencoderKL:
    """Autoencoder, 32 px RGB in [-1, 1] to latents [4, 8, 8]."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=32,
    )


def unet() -> UNet2DConditionModel:
    """Noise predictor on [4, 8, 8] latents, with cross-attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=128,
        attention_head_dim=4,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Text encoder: prompts of 40 tokens to features [40, 128]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenizer(captions: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's file format: the captions' words are whole tokens, any other text is bytes.

    Writes ``vocab.json`` and ``merges.txt`` to ``folder`` on the way.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(r" ", "removed"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, end_of_word_suffix="</w>", initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(sorted(set(captions)), trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(m) for m in merges)]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({w: i for i, w in enumerate(words)}, ensure_ascii=False), "utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    made = CLIPTokenizer(
        vocab={w: i for i, w in enumerate(words)}, merges=merges, model_max_length=TOKENS,
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    made.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def vit() -> timm.models.vision_transformer.VisionTransformer:
    """A timm VisionTransformer for 32 px RGB; returns features [n, 128]."""
    return timm.models.vision_transformer.VisionTransformer(**VIT)


class EyeConfig(PretrainedConfig):
    """Configuration of :class:`Eye`."""

    model_type = "miniature_eye"

    def __init__(self, hidden_size: int = 128, width: int = 24, **rest: object) -> None:
        """``hidden_size`` features at each of 4 x 4 places; ``width`` channels at full size."""
        super().__init__(**rest)
        self.hidden_size, self.width = hidden_size, width


class Eye(PreTrainedModel):
    """Convolutional image encoder: [n, 3, 32, 32] in [-1, 1] to 16 places' features [n, 16, hidden]."""

    config_class = EyeConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EyeConfig) -> None:
        """Four stages of two convolutions, each stage at half the size."""
        super().__init__(config)
        w = config.width
        stages: list[nn.Module] = [nn.Conv2d(3, w, 3, padding=1)]
        for inputs, outputs, stride in ((w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, config.hidden_size, 2)):
            stages += [_Residual(inputs), nn.GroupNorm(8, inputs), nn.SiLU()]
            stages += [nn.Conv2d(inputs, outputs, 3, stride, 1)]
        self.stages = nn.Sequential(
            *stages, _Residual(config.hidden_size), nn.GroupNorm(8, config.hidden_size)
        )
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, config.hidden_size))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **_: object) -> BaseModelOutput:
        """Features [n, 16, hidden]."""
        features = self.stages(pixel_values).flatten(2).transpose(1, 2)
        return BaseModelOutput(last_hidden_state=(features + self.place).contiguous())


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


AutoConfig.register("miniature_eye", EyeConfig)
AutoModel.register(EyeConfig, Eye)


def captioner(tokenizer: CLIPTokenizer) -> VisionEncoderDecoderModel:
    """An :class:`Eye` that looks and a GPT-2 that writes, with the generator's words; images in [-1, 1]."""
    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=40, n_embd=128, n_layer=1, n_head=4, n_inner=256,
            add_cross_attention=True, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model = VisionEncoderDecoderModel(encoder=Eye(EyeConfig()), decoder=decoder)
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id = tokenizer.bos_token_id
        config.pad_token_id = config.eos_token_id = tokenizer.eos_token_id
    return model


class Judge(nn.Module):
    """Convolutional reader of every attribute, used only to measure; images [n, 3, 32, 32] in [0, 1]."""

    def __init__(self, sizes: dict[str, int], width: int = 32) -> None:
        """One linear head for each attribute; ``sizes`` gives the number of its values."""
        super().__init__()
        w = width
        self.sizes = dict(sizes)
        self.body = nn.Sequential(
            *_block(3, w), *_block(w, w), nn.MaxPool2d(2), *_block(w, 2 * w), *_block(2 * w, 2 * w),
            nn.MaxPool2d(2), *_block(2 * w, 3 * w), *_block(3 * w, 3 * w), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(3 * w * 16, 96), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(96, n) for name, n in sizes.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits [n, values] for each attribute."""
        features = self.body(images * 2 - 1)
        return {name: head(features) for name, head in self.heads.items()}


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
