"""The kernel distance against sums written out, the kernel's own moments, and what it must not see."""

from statistics import fmean

import pytest
import torch

from tasks.similarity.mmd import polynomial_mmd


def normal(n: int, seed: int, mean: float = 0.0, d: int = 1) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + mean


def test_two_points_each_by_hand() -> None:
    # d = 2: k(x, x') = (1 + 1)^3 = 8 within x, (0 / 2 + 1)^3 = 1 within y and between
    x = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    y = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    assert polynomial_mmd(x, y) == pytest.approx(8 + 1 - 2 * 1)


def test_it_equals_the_definition_pair_by_pair() -> None:
    x, y = normal(7, 0, d=5), normal(4, 1, 0.3, d=5)

    def mean(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        return fmean((float(a.double() @ b.double()) / 5 + 1) ** 3 for a, b in pairs)

    within = [mean([(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    between = mean([(a, b) for a in x for b in y])
    assert polynomial_mmd(x, y) == pytest.approx(sum(within) - 2 * between, rel=1e-9)


def test_it_finds_the_difference_of_the_moments() -> None:
    # one feature: k(x, y) = 1 + 3 xy + 3 x^2 y^2 + x^3 y^3, so MMD^2 = 3 dm1^2 + 3 dm2^2 + dm3^2;
    # N(0, 1) has moments 0, 1, 0 and N(1, 1) has 1, 2, 4: 3 + 3 + 16
    quantiles = (torch.arange(1500, dtype=torch.float64) + 0.5) / 1500
    sample = torch.special.ndtri(quantiles)[:, None]
    assert polynomial_mmd(sample, sample + 1) == pytest.approx(22, rel=0.03)


def test_it_is_unbiased_at_five_samples() -> None:
    found = [polynomial_mmd(normal(5, 2 * i, d=8), normal(5, 2 * i + 1, d=8)) for i in range(400)]
    spread = torch.tensor(found).std().item() / 20
    assert abs(fmean(found)) < 3 * spread
    assert min(found) < 0


def test_it_is_symmetric_and_blind_to_order() -> None:
    x, y = normal(6, 0, d=3), normal(9, 1, d=3)
    assert polynomial_mmd(x, y) == pytest.approx(polynomial_mmd(y.flip(0), x.flip(0)))


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.zeros(1, 3), torch.zeros(4, 3), r"got 1 and 4"),
        (torch.zeros(4, 3), torch.zeros(4, 2), r"\[4, 3\] and \[4, 2\]"),
        (torch.zeros(4), torch.zeros(4), "must be"),
        (torch.full((2, 2), float("nan")), torch.zeros(2, 2), "NaN"),
    ],
)
def test_bad_input_is_named(x: torch.Tensor, y: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        polynomial_mmd(x, y)
