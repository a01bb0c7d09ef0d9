"""Text-to-image with any model in Stable Diffusion's format: prompts and seeds in, images out (Eq. 4).

An image is a function of weights, adapter, prompt, seed, scheduler, steps, guidance, type and batch shape.
So the batch shape is fixed: the last batch is filled by repeating its last entry, and every prompt is
encoded alone. The noise of each image comes from a CPU generator of its own: the same in every batch.
The same prompt, seed, scheduler and batch shape give what ``StableDiffusionPipeline`` gives.

On a GPU weights lie channels last, and attention is torch's fused one. Where a batch does not fit the
memory, it is halved for good: ``batch`` says what is drawn at once.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from tasks.diffusion import adapters
from tasks.diffusion.checkpoint import Source, open_pipeline
from tasks.diffusion.recording import Recorder
from tasks.diffusion.sampler import (
    ChainResult,
    Condition,
    Scheduler,
    SchedulerName,
    make_scheduler,
    sample_chain,
)
from tasks.images import Format
from tasks.records import Digest, Frozen
from tasks.settings import added_later
from tasks.store import digest_of

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

log = logging.getLogger("fscil.generator")

DECODED_PIXELS = 8 * 512 * 512
"""Pixels decoded at once; with gradient a quarter of that."""

CHECKPOINTED_SIZE = 256
"""From this image side on, activations are recomputed in the backward pass rather than kept."""

_CACHED_PROMPTS = 1024


class GeneratorSettings(Frozen):
    """Which model draws, and how. Everything but where the weights are changes the images or their files.

    Attributes:
        path: a folder, a ``.safetensors`` file or a hub's name; see ``tasks.diffusion.checkpoint``.
        revision: of a model on a hub; None for its default branch.
        variant: of the weights' files, such as ``fp16``; None for the plain ones.
        config: a folder with the tokenizer and the noise schedule that a single file lacks.
        size: side of the images in pixels.
        steps: denoising steps.
        guidance: s of diffusers = 1 + w of Eq. 4.
        scheduler: ``ddim`` (eta 0) or ``dpmsolver++``.
        batch: images drawn at once; halved where the memory does not suffice.
        dtype: of the weights while drawing, whatever they are stored in.
        negative_prompt: what the null branch of the guidance is told.
        format: of the images' files; both are lossless.
        compile: let ``torch.compile`` make kernels of the noise predictor: minutes first, then faster.
    """

    path: str
    revision: str | None
    size: int = Field(ge=8)
    steps: int = Field(ge=2, le=1000)
    guidance: float = Field(ge=0)
    scheduler: SchedulerName
    batch: int = Field(ge=1)
    dtype: Literal["float32", "bfloat16"]
    negative_prompt: str
    variant: str | None = added_later(None)
    config: str | None = added_later(None)
    format: Format = added_later("png")
    compile: bool = added_later(False)

    @property
    def source(self) -> Source:
        """Where the weights are."""
        return Source(path=self.path, revision=self.revision, variant=self.variant, config=self.config)


class Generator(Protocol):
    """What the stages need of a generator."""

    batch: int
    """How many images are drawn at once, by now."""

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "n 3 h w"]:
        """Images in [0, 1], one for each prompt and seed."""

    def fits(self, prompt: str) -> bool:
        """Whether the text encoder reads the prompt to its end."""

    def use_adapter(self, folder: Path | None) -> None:
        """Draw with the adapter saved in a folder from now on, or with the base weights."""


class StableDiffusion:
    """A Stable Diffusion model, frozen, taken apart into what sampling and tuning need."""

    def __init__(
        self,
        settings: GeneratorSettings,
        device: torch.device,
        *,
        vae: "AutoencoderKL",
        unet: "UNet2DConditionModel",
        text_encoder: "CLIPTextModel",
        tokenizer: "CLIPTokenizer",
        scheduler: Scheduler,
    ) -> None:
        """Args: the parts of a pipeline; they are put into evaluation mode, frozen and moved to ``device``.

        Raises:
            ValueError: ``settings.size`` is not a multiple of the autoencoder's reduction.
        """
        self.settings, self.device = settings, device
        self.vae, self.unet, self.text_encoder = vae, unet, text_encoder
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.reduction = 2 ** (len(vae.config.block_out_channels) - 1)
        if settings.size % self.reduction:
            raise ValueError(f"generator.size={settings.size} must be a multiple of {self.reduction}")
        for model in (vae, unet, text_encoder):
            model.requires_grad_(False).eval().to(device)
        if settings.size >= CHECKPOINTED_SIZE:
            unet.enable_gradient_checkpointing()
            vae.enable_gradient_checkpointing()
        if device.type == "cuda":
            for model in (vae, unet):
                model.to(memory_format=torch.channels_last)
        if settings.compile:
            unet.compile()
        self.recorder = Recorder(unet) if device.type == "cpu" and not settings.compile else None
        self.batch = settings.batch
        self._encoded: dict[str, Tensor] = {}
        self._adapter: Digest | None = None

    @classmethod
    def from_settings(cls, settings: GeneratorSettings, device: torch.device) -> "StableDiffusion":
        """Load the model that the settings name. The noise schedule is its own, the solver that of the settings.

        Raises:
            ValueError: no model there, one of another family, or a ``size`` that does not fit it.
        """
        pipeline = open_pipeline(settings.source, getattr(torch, settings.dtype))
        return cls(
            settings,
            device,
            vae=pipeline.vae,
            unet=pipeline.unet,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            scheduler=make_scheduler(pipeline.scheduler.config, settings.scheduler),
        )

    # ------------------------------------------------------------------------------------- prompts

    def token_count(self, prompt: str) -> int:
        """Tokens of the prompt, begin and end marks included."""
        return len(self.tokenizer(prompt, truncation=False, verbose=False).input_ids)

    def fits(self, prompt: str) -> bool:
        """Whether the text encoder reads the prompt to its end (CLIP's: 77 tokens with the two marks)."""
        return self.token_count(prompt) <= self.tokenizer.model_max_length

    def encode_prompts(self, prompts: Sequence[str]) -> Float[Tensor, "n tokens d"]:
        """Prompt embeddings; each text is encoded once and alone, beyond the encoder's length it is cut off."""
        if len(self._encoded) > _CACHED_PROMPTS:
            self._encoded.clear()
        for prompt in dict.fromkeys(prompts):
            if prompt not in self._encoded:
                self._encoded[prompt] = self._encode(prompt)
        return torch.cat([self._encoded[prompt] for prompt in prompts])

    @torch.no_grad()
    def _encode(self, prompt: str) -> Float[Tensor, "1 tokens d"]:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            [prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        return self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask if masked else None)[
            0
        ]

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Embeddings of the prompts and of the negative prompt, with the guidance scale."""
        null = self.encode_prompts([self.settings.negative_prompt])
        return Condition(self.encode_prompts(prompts), null, self.settings.guidance)

    # ------------------------------------------------------------------------------------- sampling

    def initial_noise(self, seeds: Sequence[int]) -> Float[Tensor, "n c h w"]:
        """Standard normal latents, each from a CPU generator of its own."""
        side = self.settings.size // self.reduction
        shape, dtype = (self.unet.config.in_channels, side, side), self.unet.conv_in.weight.dtype
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) for seed in seeds
        ]
        return torch.stack(noise).to(self.device)

    def sample_latents(
        self, prompts: Sequence[str], seeds: Sequence[int], keep_step: Sequence[int] | None = None
    ) -> ChainResult:
        """Run the chain for all prompts in one batch, without gradient.

        Args:
            prompts: n texts.
            seeds: n seeds.
            keep_step: steps whose input latents are returned too.

        Raises:
            ValueError: not as many seeds as prompts, or none.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"got {len(prompts)} prompts and {len(seeds)} seeds; one seed for each prompt")
        noise, condition = self.initial_noise(seeds), self.condition(prompts)
        return sample_chain(
            self.unet, self.scheduler, self.settings.steps, noise, condition, keep_step or (), self.recorder
        )

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Float[Tensor, "n 3 h w"]:
        """Draw one image for each prompt and seed, in batches of the fixed shape.

        Args:
            prompts: n texts; n may be 0.
            seeds: n seeds, each in 0..2**64-1.

        Returns:
            float32 [n, 3, size, size] in [0, 1], on the CPU. Image i does not depend on n.

        Raises:
            ValueError: not as many seeds as prompts, or not even one image fits the device's memory.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"got {len(prompts)} prompts and {len(seeds)} seeds; one seed for each prompt")
        while (images := self._drawn_at_once(prompts, seeds, self.batch)) is None:
            self._halve_batch()
        return images

    def _drawn_at_once(self, prompts: Sequence[str], seeds: Sequence[int], batch: int) -> Tensor | None:
        """All images in batches of one shape; None where the device's memory does not suffice."""
        try:
            return self._draw(prompts, seeds, batch)
        except torch.OutOfMemoryError:
            return None  # only once the error is gone is the memory that its frames hold free

    def _halve_batch(self) -> None:
        size = self.settings.size
        if self.batch == 1:
            raise ValueError(
                f"not even one image of {size} x {size} fits the memory of {self.device}; lower generator.size"
            )
        self.batch //= 2
        log.warning(
            "out of memory on %s: from now on %d images of %d x %d are drawn at once; the record says so",
            *(self.device, self.batch, size, size),
        )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _draw(self, prompts: Sequence[str], seeds: Sequence[int], batch: int) -> Tensor:
        size = self.settings.size
        images = torch.empty(len(prompts), 3, size, size)
        for start in range(0, len(prompts), batch):
            texts, numbers = list(prompts[start : start + batch]), list(seeds[start : start + batch])
            padding = batch - len(texts)
            chain = self.sample_latents(texts + texts[-1:] * padding, numbers + numbers[-1:] * padding)
            images[start : start + batch] = self.decode(chain.latents)[: len(texts)].cpu()
        return images

    # ------------------------------------------------------------------------------------- autoencoder

    @property
    def gradient_chunk(self) -> int:
        """Images decoded at once where a gradient is kept."""
        return max(1, DECODED_PIXELS // 4 // self.settings.size**2)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "n c h w"], chunk: int | None = None) -> Float[Tensor, "n 3 H W"]:
        """Latents to float32 images in [0, 1]; at most ``chunk`` at once (None: by their size)."""
        chunk = chunk or max(1, DECODED_PIXELS // self.settings.size**2)
        parts = [self.decode_with_gradient(part).float().clamp(0, 1) for part in latents.split(chunk)]
        return torch.cat(parts)

    def decode_with_gradient(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 H W"]:
        """Latents to images about [0, 1], not clamped: a clamp has no gradient where it acts."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        decoded = self.vae.decode(scaled, return_dict=False)[0]
        return decoded.to(torch.promote_types(decoded.dtype, torch.float32)) / 2 + 0.5

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Images in [0, 1] to scaled latents: the mode of the encoder's distribution."""
        pixels = (images.to(self.device) * 2 - 1).to(self.vae.dtype)
        chunk = max(1, DECODED_PIXELS // self.settings.size**2)
        parts = [self.vae.encode(part).latent_dist.mode() for part in pixels.split(chunk)]
        return torch.cat(parts) * self.vae.config.scaling_factor

    # ------------------------------------------------------------------------------------- adapter

    def use_adapter(self, folder: Path | None) -> None:
        """Draw with the adapter saved in ``folder`` from now on; None: with the base weights.

        Raises:
            ValueError: no adapter there, or one made for another model.
        """
        digest = digest_of(folder / adapters.FILE) if folder and (folder / adapters.FILE).is_file() else None
        if digest is not None and digest == self._adapter:
            return
        self._adapter = None
        adapters.remove(self.unet)
        if folder is not None:
            adapters.load(self.unet, folder)
            self._adapter = digest

    def begin_tuning(self, rank: int, alpha: float, seed: int) -> list[torch.nn.Parameter]:
        """Make the adapter trainable, attaching a new one if there is none.

        From here on its weights are not those of the folder it came from; :meth:`use_adapter` loads anew.

        Raises:
            ValueError: the attached adapter has another rank.
        """
        self._adapter = None
        if not adapters.is_attached(self.unet):
            return adapters.attach(self.unet, rank, alpha, seed)
        if (found := adapters.rank_of(self.unet)) != rank:
            raise ValueError(
                f"the adapter so far has rank {found}, but tuning.rank={rank}; use {found} or start anew"
            )
        adapters.set_alpha(self.unet, alpha)
        return adapters.trainable(self.unet)
