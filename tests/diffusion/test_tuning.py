"""Tuning as a whole: direction, determinism, which steps it draws, when it refuses."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from tasks.diffusion.generator import StableDiffusion
from tasks.diffusion.tuning import TuningError, TuningExample, TuningSettings, plan, tune
from tests.diffusion.conftest import awaken

Build = Callable[..., StableDiffusion]

SETTINGS = TuningSettings(
    rank=4,
    alpha=4,
    learning_rate=3e-3,
    updates=4,
    batch=2,
    beta_ldm=0.0,
    beta_p=1.0,
    beta_c=1.0,
    lam=1.0,
    margin=0.5,
    clip=1.0,
    border=0.5,
    coef="unit",
    loss_sign="distance",
    size=None,
    anchor=0.0,
)
SERIES = {
    "loss",
    "ldm",
    "perceptual",
    "contrastive",
    "ssim_positive",
    "ssim_negative",
    "contrast",
    "grad_norm",
}


def example(generator: StableDiffusion, n: int, level: str = "semantic", negatives: int = 2) -> TuningExample:
    """A positive near what the generator draws, so that one update can be seen to approach it."""
    rng = torch.Generator().manual_seed(n)
    image = generator.draw([f"number {n}"], [n])[0]
    noise = torch.rand(3, 4, 4, generator=rng)
    texture = torch.nn.functional.interpolate(noise[None], 16, mode="bilinear")[0]
    return TuningExample(
        prompt=f"number {n}",
        level=level,
        positive=(0.6 * image + 0.4 * texture).clamp(0, 1),
        negatives=torch.rand(negatives, 3, 16, 16, generator=rng),
        seed=n,
    )


def weights(generator: StableDiffusion) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in generator.begin_tuning(4, 4, seed=0)])


@pytest.mark.parametrize(("sign", "closer"), [("distance", True), ("as_printed", False)])
@pytest.mark.parametrize("level", ["semantic", "detail"])
def test_one_update_approaches_the_positive_and_as_printed_leaves_it(
    build: Build, sign: str, closer: bool, level: str
) -> None:
    settings = SETTINGS.model_copy(
        update={"loss_sign": sign, "updates": 1, "learning_rate": 1e-3, "batch": 4}
    )
    generator = build()
    examples = [example(generator, n, level) for n in range(4)]
    awaken(generator.begin_tuning(4, 4, seed=0), 0.02)
    before = tune(generator, examples, settings, steps_rule="guided", seed=1).series
    after = tune(generator, examples, settings, steps_rule="guided", seed=1).series  # the same noise again
    gained = after["ssim_positive"][0] - before["ssim_positive"][0]
    lost = after["ssim_negative"][0] - before["ssim_negative"][0]
    assert (gained > 0) == closer
    assert (gained - lost > 0) == closer
    assert abs(gained) > 1e-5


def test_every_statistic_has_one_value_an_update_and_progress_is_told(build: Build) -> None:
    generator = build()
    told: list[tuple[int, int]] = []
    settings = SETTINGS.model_copy(update={"beta_ldm": 0.5, "anchor": 0.1, "size": 12})
    result = tune(
        generator,
        [example(generator, 0), example(generator, 1, "detail", negatives=0)],
        settings,
        steps_rule="guided",
        seed=0,
        progress=lambda done, total: told.append((done, total)),
    )
    assert set(result.series) == SERIES
    assert {len(values) for values in result.series.values()} == {4}
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    for i in range(4):
        terms = {name: values[i] for name, values in result.series.items()}
        weighted = 0.5 * terms["ldm"] + terms["perceptual"] + terms["contrastive"]
        assert terms["loss"] == pytest.approx(weighted, rel=0.05)
        assert terms["ldm"] > 0


def test_the_same_seed_gives_the_same_adapter_and_another_another(build: Build) -> None:
    results = []
    for seed in (0, 0, 1):
        generator = build()
        examples = [example(generator, n) for n in range(3)]
        result = tune(generator, examples, SETTINGS, steps_rule="guided", seed=seed)
        results.append((result.series, result.steps_drawn, weights(generator)))
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])
    assert not torch.equal(results[0][2], results[2][2])


def test_tuning_goes_on_from_the_adapter_that_is_there(build: Build) -> None:
    generator = build()
    examples = [example(generator, n) for n in range(2)]
    tune(generator, examples, SETTINGS, steps_rule="guided", seed=0)
    first = weights(generator)
    still = SETTINGS.model_copy(update={"learning_rate": 1e-12})
    tune(generator, examples, still, steps_rule="guided", seed=1)
    assert torch.allclose(weights(generator), first, atol=1e-6)


def planned(levels: list[str], rule: str, updates: int) -> list[tuple[str, int, list[TuningExample]]]:
    blank = torch.zeros(3, 16, 16)
    examples = [TuningExample(str(n), level, blank, blank[None], n) for n, level in enumerate(levels)]
    settings = SETTINGS.model_copy(update={"updates": updates})
    return list(plan(examples, settings, 6, steps_rule=rule, seed=3))


@pytest.mark.parametrize(
    ("rule", "levels", "expected"),
    [
        ("guided", ["semantic"], {0, 1, 2}),
        ("guided", ["detail"], {3, 4, 5}),
        ("guided", ["semantic", "detail"], {0, 1, 2, 3, 4, 5}),
        ("first", ["detail"], {0, 1, 2}),
        ("random", ["semantic"], {0, 1, 2, 3, 4, 5}),
    ],
)
def test_steps_come_from_the_rules_window(rule: str, levels: list[str], expected: set[int]) -> None:
    updates = planned(levels, rule, 60)
    assert {step for _, step, _ in updates} == expected
    if rule == "guided":
        for _, step, batch in updates:
            assert {e.level for e in batch} == {"semantic" if step < 3 else "detail"}


def test_steps_follow_the_border() -> None:
    settings = SETTINGS.model_copy(update={"updates": 60, "border": 0.34})
    blank = torch.zeros(3, 16, 16)
    examples = [
        TuningExample(str(n), level, blank, blank[None], n) for n, level in enumerate(("semantic", "detail"))
    ]
    drawn: dict[str, set[int]] = {"semantic": set(), "detail": set()}
    for window, step, _ in plan(examples, settings, 6, steps_rule="guided", seed=3):
        drawn[window].add(step)
    assert drawn == {"semantic": {0, 1}, "detail": {2, 3, 4, 5}}


def test_a_window_is_tuned_in_proportion_and_every_example_in_its_turn() -> None:
    updates = planned(["semantic"] * 3 + ["detail"], "guided", 12)
    assert Counter(window for window, _, _ in updates) == {"semantic": 9, "detail": 3}
    assert Counter(e.prompt for _, _, batch in updates for e in batch) == {"0": 6, "1": 6, "2": 6, "3": 6}


def test_divergence_is_refused_with_the_update(build: Build) -> None:
    generator = build()
    bad = example(generator, 0)
    parameters = generator.begin_tuning(4, 4, seed=0)
    parameters[1].data.fill_(torch.inf)
    with pytest.raises((TuningError, ValueError), match="update 0"):
        tune(generator, [bad], SETTINGS, steps_rule="guided", seed=0)


def test_an_exploding_gradient_is_recorded_as_it_was_and_applied_within_the_clip(build: Build) -> None:
    generator = build()
    examples = [example(generator, n) for n in range(2)]
    parameters = generator.begin_tuning(4, 4, seed=0)
    awaken(parameters, 0.02)
    settings = SETTINGS.model_copy(update={"updates": 1, "beta_p": 1e6, "clip": 0.5})
    series = tune(generator, examples, settings, steps_rule="guided", seed=0).series
    assert series["grad_norm"][0] > 100 * settings.clip
    applied = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
    assert float(applied) == pytest.approx(settings.clip, rel=1e-3)
    assert float(applied) <= settings.clip * (1 + 1e-6)


def test_no_example_is_refused(build: Build) -> None:
    with pytest.raises(ValueError, match="at least one example"):
        tune(build(), [], SETTINGS, steps_rule="guided", seed=0)
