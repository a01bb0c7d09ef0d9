"""Which steps and timesteps a level owns."""

import pytest
import torch

from tasks.diffusion.windows import draw_step, step_window, timestep_range, window_of


def test_the_levels_share_twenty_steps_in_halves() -> None:
    assert step_window("semantic", 20, 0.5) == range(10)
    assert step_window("detail", 20, 0.5) == range(10, 20)
    assert step_window("any", 20, 0.5) == range(20)


@pytest.mark.parametrize("n", [2, 3, 7, 50])
@pytest.mark.parametrize("border", [0.01, 0.29, 0.5, 0.99])
def test_no_step_is_lost_or_shared(n: int, border: float) -> None:
    semantic, detail = step_window("semantic", n, border), step_window("detail", n, border)
    assert [*semantic, *detail] == list(range(n))
    assert min(len(semantic), len(detail)) >= 1


@pytest.mark.parametrize(
    ("n", "border", "first"), [(20, 0.45, 9), (20, 0.3, 6), (100, 0.29, 29), (7, 0.5, 3), (20, 0.999, 19)]
)
def test_the_border_is_the_semantic_share(n: int, border: float, first: int) -> None:
    assert step_window("semantic", n, border) == range(first)


@pytest.mark.parametrize("level", ["semantic", "detail", "any"])
def test_draws_cover_the_window_evenly_and_follow_the_seed(level: str) -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = [draw_step(level, 6, 0.5, rng) for _ in range(600)]
    again = torch.Generator().manual_seed(0)
    assert drawn == [draw_step(level, 6, 0.5, again) for _ in range(600)]
    counts = [drawn.count(k) for k in step_window(level, 6, 0.5)]
    assert sum(counts) == 600
    assert min(counts) > 0.7 * 600 / len(counts)


def test_timesteps_fall_into_the_half_of_their_step() -> None:
    chain = list(range(951, 0, -50))  # 20 steps, leading spacing, offset 1
    semantic, detail = (timestep_range(level, chain, 0.5, 1000) for level in ("semantic", "detail"))
    assert [t in semantic for t in chain] == [True] * 10 + [False] * 10
    assert [*detail, *semantic] == list(range(1000))
    assert timestep_range("any", chain, 0.5, 1000) == range(1000)


def test_timesteps_follow_the_border() -> None:
    chain = list(range(951, 0, -50))
    semantic, detail = (timestep_range(level, chain, 0.3, 1000) for level in ("semantic", "detail"))
    assert [t in semantic for t in chain] == [True] * 6 + [False] * 14
    assert [*detail, *semantic] == list(range(1000))


def test_rules() -> None:
    assert [window_of("guided", level) for level in ("semantic", "detail")] == ["semantic", "detail"]
    assert window_of("random", "detail") == "any"
    assert window_of("first", "detail") == "semantic"


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="'coarse' is unknown"):
        step_window("coarse", 20, 0.5)
    with pytest.raises(ValueError, match="at least 2 steps"):
        step_window("semantic", 1, 0.5)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.0"):
        step_window("semantic", 20, 1.0)
    with pytest.raises(ValueError, match="'none' is unknown"):
        window_of("none", "semantic")
