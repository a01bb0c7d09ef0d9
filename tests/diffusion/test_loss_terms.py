"""The terms of Eq. 8 one by one: what each adds, what switching it off saves, which way an update goes."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flows.config import ConfigError, load_config
from tasks.diffusion.generator import StableDiffusion
from tasks.diffusion.sampler import step_coefficients
from tasks.diffusion.tuning import TuningExample, TuningResult, TuningSettings, tune
from tasks.seeding import seed_for
from tests.diffusion.conftest import awaken

Build = Callable[..., StableDiffusion]

STEPS = 6
SETTINGS = TuningSettings(
    rank=4, alpha=4, learning_rate=1e-12, updates=1, batch=2, beta_ldm=0.5, beta_p=1.0, beta_c=2.0, lam=1.0, margin=0.5,
    clip=1e9, coef="exact", loss_sign="distance", size=None, anchor=0.0, border=0.5,
)  # fmt: skip
OFF = {"beta_ldm": 0.0, "beta_p": 0.0, "beta_c": 0.0}


def blend(image: Tensor, seed: int, share: float) -> Tensor:
    """A picture that differs from ``image`` by a coarse texture, so that SSIM has something to climb."""
    noise = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    texture = torch.nn.functional.interpolate(noise, 16, mode="bilinear")[0]
    return ((1 - share) * image + share * texture).clamp(0, 1)


@pytest.fixture(scope="module")
def examples(loaded: StableDiffusion) -> list[TuningExample]:
    """Positive and negatives on either side of what the generator draws."""
    drawn = loaded.draw([f"number {n}" for n in range(4)], range(4))
    return [
        TuningExample(
            prompt=f"number {n}",
            level="semantic",
            positive=blend(image, n, 0.4),
            negatives=torch.stack([blend(image, 100 + 10 * n + m, 0.25) for m in range(2)]),
            seed=n,
        )
        for n, image in enumerate(drawn)
    ]


def tuned(
    build: Build, examples: Sequence[TuningExample], seed: int = 1, scheduler: str = "ddim", **changes: object
) -> tuple[StableDiffusion, TuningResult, Tensor]:
    """One update (by default too small to matter) of an adapter that is awake, and its gradient."""
    generator = build(steps=STEPS, scheduler=scheduler)
    awaken(generator.begin_tuning(4, 4, seed=0), 0.02)
    settings = SETTINGS.model_copy(update=changes)
    result = tune(generator, examples, settings, steps_rule="guided", seed=seed)
    gradient = torch.cat([p.grad.flatten() for p in generator.begin_tuning(4, 4, seed=0)])
    return generator, result, gradient


def test_the_gradient_is_the_weighted_sum_of_each_terms_own(
    build: Build, examples: list[TuningExample]
) -> None:
    _, _, together = tuned(build, examples)
    alone = {name: tuned(build, examples, **(OFF | {name: 1.0}))[2] for name in OFF}
    expected = sum(getattr(SETTINGS, name) * gradient for name, gradient in alone.items())
    assert (together - expected).norm() <= 1e-4 * expected.norm()
    assert all(gradient.norm() > 0 for gradient in alone.values())


@pytest.mark.parametrize("off", sorted(OFF))
def test_a_term_does_not_change_the_draws_of_the_others(
    build: Build, examples: list[TuningExample], off: str
) -> None:
    _, everything, _ = tuned(build, examples)
    _, without, _ = tuned(build, examples, **{off: 0.0})
    assert without.steps_drawn == everything.steps_drawn
    shared = set(without.series) - {"loss", "grad_norm"}
    assert len(shared) >= 4
    assert {name: without.series[name] for name in shared} == {
        name: everything.series[name] for name in shared
    }


def watched(generator: StableDiffusion) -> Counter[str]:
    """Counts, from now on, of what costs time."""
    calls: Counter[str] = Counter()
    generator.unet.register_forward_hook(lambda *_: calls.update(["unet"]))
    generator.vae.encoder.register_forward_hook(lambda *_: calls.update(["encode"]))
    generator.vae.decoder.register_forward_hook(lambda *_: calls.update(["decode"]))
    return calls


DRAWN = {"perceptual", "ssim_positive", "contrast"}
CONTRASTED = {"contrastive", "ssim_negative"}


@pytest.mark.parametrize(
    ("on", "calls", "series"),
    [
        ({"beta_ldm": 1.0}, {"unet": 1, "encode": 1}, {"ldm"}),
        ({"beta_p": 1.0}, {"unet": STEPS + 1, "decode": 1}, DRAWN),
        ({"beta_c": 1.0}, {"unet": STEPS + 1, "decode": 1}, DRAWN | CONTRASTED),
        ({"beta_ldm": 1.0, "anchor": 1.0}, {"unet": STEPS + 3, "encode": 1, "decode": 1}, DRAWN | {"ldm"}),
        (
            {"beta_ldm": 1.0, "beta_p": 1.0, "beta_c": 1.0},
            {"unet": STEPS + 2, "encode": 1, "decode": 1},
            DRAWN | CONTRASTED | {"ldm"},
        ),
    ],
)
def test_a_term_that_is_off_costs_nothing(
    build: Build, examples: list[TuningExample], on: dict[str, float], calls: dict[str, int], series: set[str]
) -> None:
    generator = build(steps=STEPS)
    if "beta_c" not in on:  # these could not even be compared
        examples = [replace(e, negatives=torch.full((2, 3, 2, 2), torch.nan)) for e in examples]
    counted = watched(generator)
    settings = SETTINGS.model_copy(update=OFF | on)
    result = tune(generator, examples, settings, steps_rule="guided", seed=1)
    assert counted == calls
    assert set(result.series) == series | {"loss", "grad_norm"}
    weighted = sum(settings.weights[name] * result.series[name][0] for name in series & set(settings.weights))
    assert result.series["loss"][0] == pytest.approx(weighted, rel=1e-6)  # a new adapter has not drifted


def test_without_any_term_there_is_nothing_to_tune() -> None:
    with pytest.raises(ConfigError, match=r"tuning: .*beta_ldm, beta_p and beta_c are all 0"):
        load_config(["tuning.beta_ldm=0", "tuning.beta_p=0", "tuning.beta_c=0"])
    alone = load_config(["tuning.beta_ldm=0", "tuning.beta_p=0", "tuning.coef=exact"]).tuning
    assert (alone.weights, alone.coef) == ({"ldm": 0, "perceptual": 0, "contrastive": 0.25}, "exact")


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("level", ["semantic", "detail"])
def test_exact_weighs_a_steps_gradient_by_its_coefficient_and_unit_all_alike(
    build: Build, examples: list[TuningExample], scheduler: str, level: str
) -> None:
    examples = [replace(example, level=level) for example in examples]
    found = {}
    for mode in ("exact", "unit"):
        generator, result, gradient = tuned(
            build, examples, coef=mode, beta_ldm=0.0, scheduler=scheduler, seed=4
        )
        found[mode] = gradient
    (step,) = result.steps_drawn
    assert (step < STEPS // 2) == (level == "semantic")
    size = step_coefficients(generator.scheduler, STEPS)[step].abs()
    assert (size - 1).abs() > 0.05, "the test must tell the two modes apart"
    assert (found["exact"] - size * found["unit"]).norm() <= 1e-4 * found["exact"].norm()


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("level", ["semantic", "detail"])
@pytest.mark.parametrize(("sign", "direction"), [("distance", 1), ("as_printed", -1)])
def test_one_update_nears_the_positive_and_leaves_the_negatives_and_as_printed_the_opposite(
    build: Build, scheduler: str, level: str, sign: str, direction: int
) -> None:
    """Eq. 6, by the same image (prompt, noise) before and after one update of L_P + 2 L_C."""
    drawn = build(steps=STEPS, scheduler=scheduler).draw(["a seven"], [noise_seed(seed=1, example=5)])[0]
    change = blend(torch.zeros(3, 16, 16), 9, 0.3) - 0.15
    negatives = torch.stack([drawn - change, drawn - 0.7 * change]).clamp(0, 1)
    example = TuningExample("a seven", level, (drawn + change).clamp(0, 1), negatives, seed=5)
    changes = {"loss_sign": sign, "coef": "unit", "beta_ldm": 0.0, "batch": 1}
    generator, before, _ = tuned(build, [example], learning_rate=1e-3, scheduler=scheduler, **changes)
    after = tune(generator, [example], SETTINGS.model_copy(update=changes), steps_rule="guided", seed=1)
    nearer = after.series["ssim_positive"][0] - before.series["ssim_positive"][0]
    farther = before.series["ssim_negative"][0] - after.series["ssim_negative"][0]
    assert direction * nearer > 1e-5
    assert direction * farther > 1e-5


def noise_seed(seed: int, example: int) -> int:
    """Of the noise that the first update's first image starts from."""
    return seed_for(seed_for(seed, "noise", 0), 0, example)
