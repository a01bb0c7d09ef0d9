"""SSIM against scikit-image on natural photographs: values, whole gradient fields, all pairs; edge cases."""

import itertools

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import structural_similarity
from torch import Tensor

from tasks.similarity.selection import farthest_points, hardest_negatives
from tasks.similarity.ssim import C1, TAPS, SsimRows, pairwise_ssim, ssim, ssim_distance

SIDE = 48
PLACES = {  # photographs that scikit-image ships, and where they are not flat
    "astronaut": (20, 190),
    "chelsea": (90, 150),
    "coffee": (120, 220),
    "rocket": (200, 300),
    "hubble_deep_field": (400, 300),
    "retina": (600, 500),
}
PAIRS = list(itertools.combinations(PLACES, 2))


def photograph(name: str, side: int = SIDE) -> Tensor:
    """[1, 3, side, side] in [0, 1], float64."""
    top, left = PLACES[name]
    pixels = getattr(data, name)()[top : top + side, left : left + side, :3] / 255.0
    return torch.tensor(pixels).permute(2, 0, 1)[None]


def album() -> Tensor:
    """All photographs, then flat, black, white and nearly flat pictures; float32."""
    flat = [torch.full((1, 3, SIDE, SIDE), level) for level in (0.5, 0.0, 1.0)]
    faint = 0.9 + 0.004 * torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return torch.cat([*(photograph(name) for name in PLACES), *flat, faint]).float()


def oracle(x: Tensor, y: Tensor, **more: object) -> tuple[float, np.ndarray] | float:
    """Scikit-image's SSIM of two [3, h, w], with the settings of Wang et al. 2004."""
    a, b = (image.permute(1, 2, 0).double().numpy() for image in (x, y))
    return structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1, **more
    )  # fmt: skip


def oracle_matrix(a: Tensor, b: Tensor) -> Tensor:
    return torch.tensor([[oracle(x, y) for y in b] for x in a])


# ------------------------------------------------------------------------------------------ one pair


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_value_of_two_photographs_is_that_of_scikit_image(one: str, other: str) -> None:
    x, y = photograph(one).float(), photograph(other).float()
    assert x.std() > 0.02
    assert ssim(x, y).item() == pytest.approx(oracle(x[0], y[0]), abs=1e-5)
    half = (x + y) / 2
    assert ssim(x, half).item() == pytest.approx(oracle(x[0], half[0]), abs=1e-5)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_gradient_field_is_that_of_scikit_image(one: str, other: str) -> None:
    """Wherever every window that holds a pixel lies inside; scikit-image averages over all windows instead."""
    x, y = photograph(one), photograph(other).requires_grad_()
    (ours,) = torch.autograd.grad(ssim(x, y).sum(), y)
    _, field = oracle(x[0], y.detach()[0], gradient=True)
    windows = (SIDE / (SIDE - TAPS + 1)) ** 2
    theirs = torch.tensor(field).permute(2, 0, 1) * windows / 3  # and not over the channels
    inner = slice(TAPS - 1, -(TAPS - 1))
    difference = (ours[0] - theirs)[:, inner, inner]
    assert theirs.abs().max() > 1e-5
    assert difference.norm() <= 1e-5 * theirs[:, inner, inner].norm()


@pytest.mark.parametrize("edge", [(0, 0), (0, 9), (7, 0), (23, 23), (12, 23)])
def test_gradient_at_the_border_is_that_of_finite_differences_of_scikit_image(edge: tuple[int, int]) -> None:
    x, y = photograph("coffee", 24), photograph("rocket", 24).requires_grad_()
    (gradient,) = torch.autograd.grad(ssim_distance(x, y).sum(), y)
    ends = []
    for step in (1e-4, -1e-4):
        moved = y.detach().clone()
        moved[0, :, *edge] += step
        ends.append(1 - oracle(x[0], moved[0]))
    assert gradient[0, :, *edge].sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_anything_is_computed(dtype: torch.dtype) -> None:
    """Both the value and the gradient are those of the rounded image, to the rounding of the result."""
    near = album()[-1:]
    for x, y in ((photograph("chelsea"), photograph("coffee")), (near, (near - 0.02).clamp(0, 1))):
        rounded = x.to(dtype).requires_grad_()
        exact = x.to(dtype).double().requires_grad_()
        value, reference = ssim(rounded, y.to(dtype)), ssim(exact, y.to(dtype).double())
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(oracle(exact.detach()[0], y.to(dtype)[0]), abs=1e-5)
        (gradient,) = torch.autograd.grad(value.sum(), rounded)
        (expected,) = torch.autograd.grad(reference.sum(), exact)
        assert torch.isfinite(gradient).all()
        assert (gradient.double() - expected).norm() <= 0.01 * expected.norm()


def test_identity_symmetry_and_bounds() -> None:
    images = album()
    pairs = torch.stack([ssim(x[None], images) for x in images])
    assert torch.equal(pairs, pairs.T)
    assert torch.allclose(pairs.diagonal(), torch.ones(len(images)), atol=1e-7)
    assert (pairs.abs() <= 1).all()
    assert (pairs[~torch.eye(len(images), dtype=torch.bool)] < 1).all()
    assert (ssim(images, 1 - images) >= -1).all()
    assert (ssim(images, 1 - images) < 0).any()


def test_of_two_flat_images_only_the_luminance_counts() -> None:
    levels = (0.0, 0.1, 0.5, 1.0)
    for a, b in itertools.product(levels, levels):
        x = torch.full((1, 3, 16, 16), a).requires_grad_()
        found = ssim(x, torch.full((1, 3, 16, 16), b))
        assert found.item() == pytest.approx((2 * a * b + C1) / (a * a + b * b + C1), abs=1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert torch.isfinite(gradient).all()
        if a == b:
            assert gradient.abs().max() < 1e-6


# ------------------------------------------------------------------------------------------ all pairs


def test_all_pairs_are_those_of_scikit_image_flat_and_black_pictures_too() -> None:
    images = album()
    expected = oracle_matrix(images, images[2:]).float()
    assert torch.allclose(pairwise_ssim(images, images[2:]), expected, atol=1e-5)


@pytest.mark.parametrize("memory_mb", [1, 256])
def test_all_pairs_equal_the_loop_over_pairs(memory_mb: int) -> None:
    images = torch.cat([album(), album().flip(-1), album().roll(5, dims=-2)])[:, :, :33]
    loop = torch.stack([ssim(x[None], images[:17]) for x in images])
    found = pairwise_ssim(images, images[:17], memory_mb=memory_mb)
    assert torch.allclose(found, loop, atol=1e-5)
    assert torch.equal(found, pairwise_ssim(images, images[:17], memory_mb=memory_mb))


def test_all_pairs_of_one_set_are_symmetric_within_bounds_and_one_on_the_diagonal() -> None:
    images = album()
    found = pairwise_ssim(images, images)
    assert torch.allclose(found, found.T, atol=1e-6)
    assert torch.allclose(found.diagonal(), torch.ones(len(images)), atol=1e-5)
    assert (found.abs() <= 1 + 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_pairs_of_half_precision_are_those_of_the_rounded_images(dtype: torch.dtype) -> None:
    images = album().to(dtype)
    found = pairwise_ssim(images, images[:5])
    assert found.dtype == torch.float32
    assert torch.allclose(found, pairwise_ssim(images.float(), images[:5].float()), atol=1e-6)


# ------------------------------------------------------------------------------------------ selection on photographs


def test_farthest_photographs_are_those_of_brute_force_over_scikit_image() -> None:
    images = album()
    distances = 1 - oracle_matrix(images, images).numpy()
    for start in range(len(images)):
        picks = [start]
        while len(picks) < 6:
            rest = [i for i in range(len(images)) if i not in picks]
            picks.append(max(rest, key=lambda i: (min(distances[i, p] for p in picks), -i)))
        assert farthest_points(SsimRows(images).row, len(images), start, 6, gap=0) == picks


def test_hardest_negatives_of_photographs_are_the_most_similar_by_scikit_image() -> None:
    images = album()
    similarities = oracle_matrix(images[:3], images[3:])
    expected = [sorted(range(len(row)), key=lambda i: -row[i])[:4] for row in similarities.tolist()]
    assert hardest_negatives(pairwise_ssim(images[:3], images[3:]), 4) == expected
