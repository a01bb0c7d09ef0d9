"""Trains every model of the miniature on the drawn corpus: ``python -m tasks.miniature.pretrain [--only NAME]``.

Order: autoencoder -> latents -> text encoder and UNet together (noise prediction, 10 % empty captions for
classifier-free guidance, averaged weights) -> ViT on the letters alone -> captioner -> judge. No real image is
used. Each part has a budget of minutes, over which its learning rate decays, saves a checkpoint every minute
and goes on from it after a kill. ``torchrun --nproc-per-node 2 -m tasks.miniature.pretrain --only text_unet``
shares a part between two processes, each with its own batches.
"""

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTokenizer

from tasks.miniature import architecture
from tasks.miniature.cache import Corpus, Settings, attributes_of, indices, load
from tasks.miniature.captions import ATTRIBUTES, VALUES, caption, parse_caption
from tasks.miniature.shipped import write_digests

WEIGHTS = Path(__file__).parent / "weights"
MINUTES = {
    "vae": 12.5, "decoder": 11.0, "text": 2.0, "text_unet": 117.0, "vit": 30.0, "captioner": 43.0, "judge": 7.0,
}  # fmt: skip
WEB = Settings(seed=1, count=100_000, letters=0.0)
ALPHABET = Settings(seed=2, count=40_000, short=0.0, letters=1.0)
JUDGING = Settings(seed=4, count=40_000, short=0.05, letters=0.0, held_out=True)
HELD_OUT = Settings(seed=5, count=3_000, short=0.05, letters=0.0)


@dataclass
class Trainer:
    """One model's training: loss by batch indices, AdamW, warm-up and cosine over a budget of minutes."""

    name: str
    modules: nn.ModuleDict
    loss: Callable[[Tensor], Tensor]
    count: int
    batch: int
    rate: float
    minutes: float
    folder: Path
    averaged: bool = False
    spent: float = 0.0
    step: int = 0
    ema: nn.ModuleDict = field(init=False)

    def __post_init__(self) -> None:
        """Set up the optimiser and take up an earlier checkpoint, if there is one."""
        self.ema = copy.deepcopy(self.modules).requires_grad_(False)
        decayed = [p for p in self.modules.parameters() if p.ndim > 1]
        plain = [p for p in self.modules.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.99))
        if self.path.exists():
            self._restore()

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.folder / f"{self.name}.pt"

    @property
    def result(self) -> nn.ModuleDict:
        """The modules to ship: averaged or last."""
        return self.ema if self.averaged else self.modules

    def _restore(self) -> None:
        saved = torch.load(self.path, weights_only=True)
        self.modules.load_state_dict(saved["modules"])
        self.ema.load_state_dict(saved["ema"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.spent, self.step = saved["spent"], saved["step"]

    def save(self) -> None:
        """Write the checkpoint beside the old one, then replace it."""
        state = {"modules": self.modules.state_dict(), "ema": self.ema.state_dict(), "spent": self.spent}
        state |= {"optimiser": self.optimiser.state_dict(), "step": self.step}
        torch.save(state, self.path.with_suffix(".part"))
        self.path.with_suffix(".part").replace(self.path)

    def _batches(self) -> Iterator[Tensor]:
        while True:
            order = torch.from_numpy(np.random.default_rng([7, self.step, rank()]).permutation(self.count))
            yield from order[: len(order) - len(order) % self.batch].split(self.batch)

    def run(self, at_checkpoint: Callable[[], None] | None = None, every: float = 60.0) -> nn.ModuleDict:
        """Train until the minutes are spent; ``at_checkpoint`` is called after each saving."""
        torch.manual_seed(2 * self.step + rank())
        bar = tqdm(desc=self.name, unit="step", initial=self.step, mininterval=10)
        saved, smoothed = self.spent, math.nan
        for index in self._batches():
            began = time.perf_counter()
            value = self._update(index)
            smoothed = value if math.isnan(smoothed) else 0.99 * smoothed + 0.01 * value
            done = self.spent >= self.minutes * 60
            self.spent += time.perf_counter() - began
            bar.update()
            bar.set_postfix(loss=f"{smoothed:.4f}", minutes=f"{self.spent / 60:.1f}", refresh=False)
            if done or self.spent - saved > every:
                saved = self.spent
                if rank() == 0:
                    self.save()
                if rank() == 0 and at_checkpoint:
                    at_checkpoint()
            if done:
                return self.result
        raise AssertionError("batches never end")

    def _update(self, index: Tensor) -> float:
        progress = min(1.0, self.spent / (self.minutes * 60))
        rate = (
            self.rate
            * min(1.0, (self.step + 1) / 200)
            * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = self.loss(index)
        loss.backward()
        if distributed.is_initialized():
            self._average()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        if self.averaged:
            keep = min(0.999, (1 + self.step) / (20 + self.step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.modules.parameters()), 1 - keep)
        return float(loss.detach())

    def _average(self) -> None:
        """Mean over the processes of gradients, and of the clock, so that all stop at one step."""
        gradients = [p.grad for p in self.modules.parameters() if p.grad is not None]
        flat = torch.cat([torch.tensor([self.spent]), *(g.flatten() for g in gradients)])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        self.spent = float(flat[0])
        for own, mean in zip(gradients, flat[1:].split([g.numel() for g in gradients]), strict=True):
            own.copy_(mean.view_as(own))


def rank() -> int:
    """This process's number; 0 where it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


# ----------------------------------------------------------------------------------------- autoencoder


def train_vae(folder: Path, minutes: float) -> AutoencoderKL:
    """Autoencoder: absolute and squared error, error of the edges, a small KL. Sets ``scaling_factor``."""
    web = load(folder, "web", WEB)
    model = architecture.vae().to(memory_format=torch.channels_last)

    def loss(index: Tensor) -> Tensor:
        images = (web.images(index.numpy()) * 2 - 1).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(images).latent_dist
            drawn = model.decode(posterior.sample()).sample.float()
        return _picture_error(drawn, images) + 2e-6 * posterior.kl().float().mean() / 16

    trained = Trainer(
        "vae", nn.ModuleDict({"vae": model}), loss, len(web.pixels), 32, 2e-3, minutes, folder, True
    )
    trained.run()
    model.load_state_dict(_part(trained.result.state_dict(), "vae"))
    vae = model.to(memory_format=torch.contiguous_format).eval()
    latents = encode(vae, web, 0, 4000)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    vae.save_pretrained(WEIGHTS / "generator" / "vae")
    return vae


def train_decoder(folder: Path, minutes: float) -> None:
    """The autoencoder's decoder alone, longer, on latents with a little noise; the latents stay as they are."""
    web = load(folder, "web", WEB)
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "generator" / "vae", use_safetensors=True)
    latents = encoded(folder, vae)
    spread = NOISE / vae.config.scaling_factor
    modules = nn.ModuleDict({"decoder": vae.decoder, "post": vae.post_quant_conv}).to(
        memory_format=torch.channels_last
    )

    def loss(index: Tensor) -> Tensor:
        images = (web.images(index.numpy()) * 2 - 1).to(memory_format=torch.channels_last)
        z = latents[index] + spread * torch.rand(len(index), 1, 1, 1) * torch.randn(len(index), 4, 8, 8)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = modules["decoder"](modules["post"](z)).float()
        return _picture_error(drawn, images)

    trainer = Trainer("decoder", modules, loss, len(latents), 32, 1.5e-3, minutes, folder, True)

    def ship() -> None:
        shipped = copy.deepcopy(vae)
        shipped.decoder.load_state_dict(trainer.result["decoder"].state_dict())
        shipped.post_quant_conv.load_state_dict(trainer.result["post"].state_dict())
        shipped.to(memory_format=torch.contiguous_format).eval().save_pretrained(
            WEIGHTS / "generator" / "vae"
        )

    trainer.run(ship, every=240)


NOISE = 0.1
"""Noise on the latents that the decoder is trained with, in units of scaled latents."""


def _picture_error(drawn: Tensor, images: Tensor) -> Tensor:
    error = drawn - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + 0.5 * edges


@torch.no_grad()
def encode(vae: AutoencoderKL, corpus: Corpus, start: int, stop: int) -> Tensor:
    """Unscaled mean latents [stop - start, 4, 8, 8]."""
    fast = copy.deepcopy(vae).eval().to(memory_format=torch.channels_last)
    parts = [slice(i, min(i + 200, stop)) for i in range(start, stop, 200)]
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat(
            [
                fast.encode(corpus.images(p) * 2 - 1).latent_dist.mean.float()
                for p in tqdm(parts, mininterval=10)
            ]
        )


def encoded(folder: Path, vae: AutoencoderKL) -> Tensor:
    """Unscaled latents of the whole web [n, 4, 8, 8], computed on the first call."""
    path = folder / "latents.pt"
    if not path.exists():
        web = load(folder, "web", WEB)
        torch.save(encode(vae, web, 0, len(web.pixels)), path)
    return torch.load(path, weights_only=True)


# ----------------------------------------------------------------------------------------- generator


def words_of(web: Corpus) -> CLIPTokenizer:
    """The shipped tokenizer, whose ids every other weight depends on; learned from the captions where it is absent."""
    folder = WEIGHTS / "generator" / "tokenizer"
    if folder.exists():
        return CLIPTokenizer.from_pretrained(folder)
    return architecture.tokenizer((c for own in web.captions for c in own), folder)


def tokenized(tokenizer: CLIPTokenizer, captions: list[list[str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids of all captions [m, 40], and where each picture's captions start and how many there are."""
    flat = [c for own in captions for c in own]
    distinct = {c: i for i, c in enumerate(dict.fromkeys(flat))}
    words = list(distinct)
    ids = [
        torch.tensor(
            tokenizer(
                words[i : i + 5000], padding="max_length", truncation=True, max_length=architecture.TOKENS
            ).input_ids
        )
        for i in range(0, len(words), 5000)
    ]
    counts = torch.tensor([len(own) for own in captions])
    rows = torch.tensor([distinct[c] for c in flat])
    return torch.cat(ids).short()[rows], counts.cumsum(0) - counts, counts


def train_text(folder: Path, minutes: float) -> None:
    """Text encoder alone first: each token from the end of the text on tells what the caption says.

    So cross-attention has the whole message from its first step on, wherever it looks; without this the UNet
    ignored its prompts for the first thousands of steps.
    """
    web = load(folder, "web", WEB)
    captions = sorted({c for own in web.captions for c in own})[::2]
    said = torch.tensor([indices(parse_caption(c)) for c in captions]) + 1
    tokenizer = words_of(web)
    ids = tokenized(tokenizer, [[c] for c in captions])[0].long()
    after = (ids == tokenizer.eos_token_id).float()
    heads = nn.ModuleDict({n: nn.Linear(128, len(VALUES[n]) + 1) for n in ATTRIBUTES})
    modules = nn.ModuleDict({"text": architecture.text_encoder(tokenizer), "heads": heads})

    def loss(index: Tensor) -> Tensor:
        features = modules["text"](ids[index]).last_hidden_state
        weight = after[index] / after[index].sum()
        losses = [
            F.cross_entropy(
                head(features).transpose(1, 2),
                said[index, i, None].expand(-1, ids.shape[1]),
                reduction="none",
            )
            for i, head in enumerate(heads.values())
        ]
        return (torch.stack(losses).sum(0) * weight).sum()

    Trainer("text", modules, loss, len(ids), 64, 2e-3, minutes, folder).run()


def train_text_unet(folder: Path, minutes: float) -> None:
    """Text encoder and UNet together on cached latents; writes the whole pipeline at every checkpoint."""
    web = load(folder, "web", WEB)
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "generator" / "vae", use_safetensors=True)
    latents = encoded(folder, vae) * vae.config.scaling_factor
    tokenizer = words_of(web)
    ids, starts, counts = tokenized(tokenizer, web.captions)
    silent = torch.tensor(
        tokenizer("", padding="max_length", max_length=architecture.TOKENS).input_ids
    ).short()
    unet, text = architecture.unet(), architecture.text_encoder(tokenizer)
    text.load_state_dict(_part(torch.load(folder / "text.pt", weights_only=True)["modules"], "text"))
    noise_schedule = architecture.scheduler()
    weights = (1 / noise_schedule.alphas_cumprod).clamp(max=HEAVIEST)
    weights = weights / weights.mean()

    def loss(index: Tensor) -> Tensor:
        chosen = ids[starts[index] + (torch.rand(len(index)) * counts[index]).long()]
        chosen[torch.rand(len(index)) < 0.1] = silent
        noise = torch.randn(len(index), *latents.shape[1:])
        t = torch.randint(0, architecture.TIMESTEPS, (len(index),))
        noisy = noise_schedule.add_noise(latents[index], noise, t)
        with torch.autocast("cpu", torch.bfloat16, enabled=BF16):
            predicted = unet(noisy, t, text(chosen.long()).last_hidden_state).sample
        return (weights[t] * (predicted.float() - noise).square().mean((1, 2, 3))).mean()

    modules = nn.ModuleDict({"unet": unet, "text": text})
    trainer = Trainer("text_unet", modules, loss, len(latents), 48, 1e-3, minutes, folder, True)

    def ship() -> None:
        current = AutoencoderKL.from_pretrained(WEIGHTS / "generator" / "vae", use_safetensors=True)
        current.register_to_config(_name_or_path="vae")  # else this machine's path is written
        save_pipeline(current, tokenizer, trainer.result)

    trainer.run(ship, every=120)


def _part(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}


HEAVIEST = 16.0
"""Cap of the loss weight 1 + sigma^2: the error counts as in the velocity, else nothing rewards reading the
prompt where the noise is strong, and the ground's colour is the starting noise's."""
BF16 = False
"""Training of the UNet in bfloat16; measured no faster here, see the model card."""


def save_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer, modules: nn.ModuleDict) -> None:
    """Write ``weights/generator`` as a Stable Diffusion folder."""
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=copy.deepcopy(modules["text"]).eval(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(modules["unet"]).eval(),
        scheduler=architecture.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(WEIGHTS / "generator")


# ----------------------------------------------------------------------------------------- readers


def augmented(images: Tensor) -> Tensor:
    """Shifts of up to 2 px, other brightness and contrast, a little noise: images [n, 3, 32, 32] in [0, 1]."""
    dx, dy = (int(v) for v in torch.randint(-2, 3, (2,)))
    moved = F.pad(images, (2, 2, 2, 2), mode="replicate")[..., 2 + dy : 34 + dy, 2 + dx : 34 + dx]
    contrast = 1 + 0.1 * torch.randn(len(images), 1, 1, 1)
    blurred = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = 0.7 * torch.rand(len(images), 1, 1, 1) * (torch.rand(len(images), 1, 1, 1) < 0.4)
    changed = (moved + mix * (blurred - moved)) * contrast + 0.03 * torch.randn(len(images), 1, 1, 1)
    return (changed + 0.03 * torch.rand(1) * torch.randn_like(images)).clamp(0, 1)


def train_vit(folder: Path, minutes: float) -> None:
    """ViT on the alphabet: 26 classes, all styles and colours. Digits stay new to it.

    Each patch also tells where the glyph is in it: the dense task starts a transformer that sees few pictures.
    """
    alphabet = load(folder, "alphabet", ALPHABET)
    labels = torch.from_numpy(alphabet.labels[:, 0])
    targets = torch.unique(labels, return_inverse=True)[1]
    width, patch = architecture.VIT["embed_dim"], architecture.VIT["patch_size"] ** 2
    vit = architecture.vit()
    modules = nn.ModuleDict({"vit": vit, "head": nn.Linear(width, 26), "mask": nn.Linear(width, patch)})

    def loss(index: Tensor) -> Tensor:
        images = augmented(alphabet.images(index.numpy()))
        tokens = vit.forward_features(images * 2 - 1)
        letter = F.cross_entropy(modules["head"](tokens[:, 0]), targets[index], label_smoothing=0.05)
        return letter + 10 * F.mse_loss(modules["mask"](tokens[:, 1:]), glyph_mask(images))

    done = Trainer("vit", modules, loss, len(targets), 64, 7e-4, minutes, folder, True).run()
    target = WEIGHTS / "classifier"
    target.mkdir(parents=True, exist_ok=True)
    save_file(done["vit"].state_dict(), target / "model.safetensors")
    config = {"architecture": "timm.models.vision_transformer.VisionTransformer", "arguments": architecture.VIT,
              "mean": [0.5] * 3, "std": [0.5] * 3, "features": architecture.VIT["embed_dim"]}  # fmt: skip
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def glyph_mask(images: Tensor) -> Tensor:
    """Distance from the corner's colour, as a share of the largest, patch by patch: [n, 64, 16] in [0, 1]."""
    distance = (images - images[..., :2, :2].mean((2, 3), keepdim=True)).abs().sum(1)
    mask = distance / distance.amax((1, 2), keepdim=True).clamp_min(0.1)
    return mask.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).flatten(1, 2)


def train_captioner(folder: Path, minutes: float) -> None:
    """Captioner: teacher forcing on full captions in their first grammar."""
    reading = load(folder, "web", WEB)
    tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "generator" / "tokenizer")
    ids = caption_ids(tokenizer, reading)
    model = architecture.captioner(tokenizer)

    def loss(index: Tensor) -> Tensor:
        images = augmented(reading.images(index.numpy())) * 2 - 1
        words = ids[index]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixel_values=images, decoder_input_ids=words[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), words[:, 1:].flatten())

    modules = nn.ModuleDict({"captioner": model})
    done = Trainer("captioner", modules, loss, len(ids), 64, 1e-3, minutes, folder, True).run(every=120)
    model.load_state_dict(_part(done.state_dict(), "captioner"))
    model.save_pretrained(WEIGHTS / "captioner")
    tokenizer.save_pretrained(WEIGHTS / "captioner")


def caption_ids(tokenizer: CLIPTokenizer, corpus: Corpus) -> Tensor:
    """Token ids [n, 30] of the first-grammar full caption of every picture, end-of-text repeated as padding."""
    texts = [caption(attributes_of(row)) for row in corpus.labels]
    return torch.tensor(tokenizer(texts, padding="max_length", max_length=30).input_ids)


def train_judge(folder: Path, minutes: float) -> None:
    """The judge: another seed's corpus, with more fonts than the others saw."""
    judging = load(folder, "judging", JUDGING)
    labels = torch.from_numpy(judging.labels)
    model = architecture.Judge({n: len(VALUES[n]) for n in ATTRIBUTES})

    def loss(index: Tensor) -> Tensor:
        images = augmented(judging.images(index.numpy()))
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
        return torch.stack(
            [F.cross_entropy(logits[n].float(), labels[index, i]) for i, n in enumerate(ATTRIBUTES)]
        ).sum()

    done = Trainer(
        "judge", nn.ModuleDict({"judge": model}), loss, len(labels), 64, 2e-3, minutes, folder
    ).run()
    target = WEIGHTS / "judge"
    target.mkdir(parents=True, exist_ok=True)
    save_file(done["judge"].half().state_dict(), target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({"sizes": model.sizes}) + "\n", "utf-8")


TRAIN: dict[str, Callable[[Path, float], object]] = {
    "vae": train_vae, "decoder": train_decoder, "text": train_text, "text_unet": train_text_unet,
    "vit": train_vit, "captioner": train_captioner, "judge": train_judge,
}  # fmt: skip


def main() -> None:
    """Train all parts, or the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(TRAIN))
    parser.add_argument(
        "--minutes", type=float, help="budget of each part trained (default: the model card's)"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(".fscil/pretrain"), help="drawn corpora and checkpoints"
    )
    parser.add_argument("--threads", type=int, default=1, help="two parts side by side beat two threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if "WORLD_SIZE" in os.environ:
        distributed.init_process_group("gloo")
    arguments.cache.mkdir(parents=True, exist_ok=True)
    for name in [arguments.only] if arguments.only else TRAIN:
        TRAIN[name](arguments.cache, arguments.minutes or MINUTES[name])
        write_digests()


if __name__ == "__main__":
    main()
