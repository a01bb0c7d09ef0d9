"""The shipped weights: they load as what they say they are, fit in git, draw what is asked and read what is drawn."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from tasks.miniature import architecture
from tasks.miniature.captions import NUMBERS, VALUES, Attributes, caption
from tasks.miniature.corpus import draw
from tasks.miniature.quality import Sampler, judged, load_judge
from tasks.miniature.reader import Reader, Reading

WEIGHTS = Path(architecture.__file__).parent / "weights"


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(WEIGHTS / "generator")


@pytest.fixture(scope="module")
def reader() -> Reader:
    return Reader.from_weights(WEIGHTS / "captioner")


def handwritten(number: str, colour: str = "white", background: str = "black") -> Attributes:
    return Attributes(number, "digit", "handwritten", "regular", "upright", colour, background)


def test_all_weights_fit_in_git() -> None:
    total = sum(p.stat().st_size for p in WEIGHTS.rglob("*") if p.is_file())
    assert total <= 25 * 2**20


def test_the_generator_is_a_stable_diffusion_folder(sampler: Sampler) -> None:
    index = json.loads((WEIGHTS / "generator" / "model_index.json").read_text("utf-8"))
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["requires_safety_checker"] is False
    names = {n.rsplit(".", 1)[-1] for n, _ in sampler.pipe.unet.named_modules()}
    assert {"to_q", "to_k", "to_v", "to_out"} <= names
    assert {p.dtype for m in (sampler.pipe.unet, sampler.pipe.vae) for p in m.parameters()} == {torch.float32}


@pytest.mark.parametrize("text", ["", "Zwölf 七 🎲 unheard-of words", "a handwritten digit " * 40])
def test_any_text_is_a_prompt(sampler: Sampler, text: str) -> None:
    features = sampler.features([text])
    assert features.shape == (1, architecture.TOKENS, 128)
    assert torch.isfinite(features).all()


def test_the_corpus_words_are_whole_tokens(sampler: Sampler) -> None:
    words = sampler.pipe.tokenizer.tokenize(caption(handwritten("seven")))
    expected = (
        "a picture of a seven , a handwritten digit , regular weight , upright , white on a black background"
    )
    assert " ".join(w.removesuffix("</w>") for w in words) == expected


def test_noise_falls_from_sigma_max_and_content_is_decided_early() -> None:
    schedule = architecture.scheduler()
    schedule.set_timesteps(20)
    alpha = schedule.alphas_cumprod[schedule.timesteps]
    sigma = ((1 - alpha) / alpha).sqrt()
    assert sigma[0] == pytest.approx(architecture.SIGMA_MAX, rel=1e-3)
    assert (sigma.diff() < 0).all()
    assert sigma[9] < 0.5


def test_equal_seeds_draw_equal_images(sampler: Sampler) -> None:
    prompts = ["A picture of a three", "A picture of a nine"]
    first, again, other = sampler.draw(prompts, 1), sampler.draw(prompts, 1), sampler.draw(prompts, 2)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.05)


def test_the_judge_reads_what_was_asked_for(sampler: Sampler) -> None:
    grounds = [("white", "black"), ("black", "yellow"), ("red", "white")]
    asked = [handwritten(n, *grounds[i % 3]) for i, n in enumerate(NUMBERS * 3)]
    read = judged(load_judge(WEIGHTS / "judge"), sampler.draw([caption(a) for a in asked], 3))
    floors = {"category": 0.8, "form": 0.8, "style": 0.7, "colour": 0.9, "background": 0.95}
    for name, floor in floors.items():
        wanted = torch.tensor([VALUES[name].index(getattr(a, name)) for a in asked])
        assert (read[name] == wanted).float().mean() >= floor, name


def test_the_bare_name_mostly_draws_something_else(sampler: Sampler) -> None:
    read = judged(
        load_judge(WEIGHTS / "judge"), sampler.draw([f"A picture of a {n}" for n in NUMBERS * 4], 4)
    )
    digits = (read["form"] == VALUES["form"].index("digit")).float().mean()
    assert digits < 0.5


def test_the_reader_reads_the_corpus(reader: Reader) -> None:
    rng = np.random.default_rng(8)
    grounds = [("white", "black"), ("green", "white"), ("black", "red")]
    shown = [handwritten(n, *grounds[i % 3]) for i, n in enumerate(NUMBERS * 4)]
    pictures = np.stack([draw(a, rng) for a in shown])
    readings = reader.read(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    for name in ("category", "form", "style", "colour", "background"):
        right = [getattr(r, name) == getattr(a, name) for r, a in zip(readings, shown, strict=True)]
        assert np.mean(right) >= 0.9, name


def test_a_reading_is_a_caption() -> None:
    reading = Reading.of(handwritten("two"))
    assert reading.caption() == caption(handwritten("two"))
    assert Reading.of(Attributes()).caption() == "A picture"


def test_the_reader_refuses_wrong_images(reader: Reader) -> None:
    with pytest.raises(ValueError, match=r"got \[1, 3, 28, 28\]"):
        reader.read(torch.zeros(1, 3, 28, 28))
    with pytest.raises(ValueError, match=r"\[0, 1\], got -1"):
        reader.read(torch.full((1, 3, 32, 32), -1.0))
    with pytest.raises(ValueError, match="no captioner in 'nowhere'"):
        Reader.from_weights("nowhere")


def test_the_vit_is_timms_and_never_saw_a_digit() -> None:
    config = json.loads((WEIGHTS / "classifier" / "config.json").read_text("utf-8"))
    model = timm.models.vision_transformer.VisionTransformer(**config["arguments"])
    model.load_state_dict(load_file(WEIGHTS / "classifier" / "model.safetensors"))
    features = model.eval()(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, config["features"])
    from tasks.miniature.pretrain import ALPHABET

    assert ALPHABET.letters == 1.0
