"""SSIM against scikit-image (Wang 2004 settings), finite differences and its own algebra."""

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import structural_similarity
from torch import Tensor

from tasks.similarity.ssim import SsimRows, pairwise_ssim, ssim, ssim_distance


def photograph(name: str, top: int, left: int, side: int) -> Tensor:
    picture = getattr(data, name)()[top : top + side, left : left + side] / 255.0
    return torch.tensor(picture, dtype=torch.float32).permute(2, 0, 1)[None]


def oracle(x: Tensor, y: Tensor) -> float:
    a, b = (t[0].permute(1, 2, 0).double().numpy() for t in (x, y))
    return structural_similarity(
        a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, channel_axis=-1
    )


def crops(side: int, count: int) -> Tensor:
    camera = torch.tensor(data.camera() / 255.0, dtype=torch.float32)
    corners = [(37 * i % (500 - side), 53 * i % (500 - side)) for i in range(count)]
    return torch.stack([camera[r : r + side, c : c + side] for r, c in corners])[:, None]


PHOTOGRAPHS = [
    ("astronaut", 0, 0, 64),
    ("astronaut", 100, 150, 96),
    ("coffee", 100, 200, 96),
    ("coffee", 9, 90, 64),
]


@pytest.mark.parametrize("place", PHOTOGRAPHS)
@pytest.mark.parametrize("change", ["noise", "other", "darker", "shifted"])
def test_value_is_that_of_scikit_image(place: tuple[str, int, int, int], change: str) -> None:
    x = photograph(*place)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    y = {
        "noise": (x + 0.1 * noise).clamp(0, 1),
        "other": photograph("coffee", 60, 300, x.shape[-1]),
        "darker": 0.5 * x,
        "shifted": x.roll(2, dims=-1),
    }[change]
    assert ssim(x, y).item() == pytest.approx(oracle(x, y), abs=1e-5)


def test_gradient_is_that_of_finite_differences_of_scikit_image() -> None:
    x, y = photograph("astronaut", 60, 200, 24).double(), photograph("chelsea", 60, 200, 24).double()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(ssim(x, y).sum(), x)
    rng, step = np.random.default_rng(0), 1e-5
    for _ in range(12):
        place = (0, int(rng.integers(3)), int(rng.integers(24)), int(rng.integers(24)))
        up, down = x.detach().clone(), x.detach().clone()
        up[place] += step
        down[place] -= step
        difference = (oracle(up, y) - oracle(down, y)) / (2 * step)
        assert gradient[place].item() == pytest.approx(difference, abs=1e-7)


def test_identity_symmetry_and_bounds() -> None:
    x = crops(32, 12)
    y = crops(32, 24)[12:]
    assert torch.allclose(ssim(x, x), torch.ones(12), atol=1e-7)
    assert torch.equal(ssim(x, y), ssim(y, x))
    assert (ssim(x, 1 - x).abs() <= 1).all()
    assert (ssim(x, 1 - x) < 0).any()
    assert torch.equal(ssim_distance(x, y), 1 - ssim(x, y))


def test_black_and_constant_images_have_the_values_of_the_formula_and_finite_gradients() -> None:
    black, grey = torch.zeros(1, 1, 16, 16), torch.full((1, 1, 16, 16), 0.5)
    assert ssim(black, black).item() == 1
    assert ssim(black, grey).item() == pytest.approx(1e-4 / (0.25 + 1e-4), rel=1e-5)
    for other in (black, grey, crops(16, 1)):
        x = black.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(ssim(x, other).sum(), x)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_first(dtype: torch.dtype) -> None:
    flat = (0.9 + 0.005 * torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    x, y = flat.to(dtype), (flat - 0.05).to(dtype)
    value = ssim(x, y)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(ssim(x.double(), y.double()).item(), abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert ssim(x, y).item() == value.item()


@pytest.mark.parametrize("memory_mb", [1, 64])
@pytest.mark.parametrize("side", [16, 33])
def test_all_pairs_equal_the_loop_over_pairs(memory_mb: int, side: int) -> None:
    a, b = crops(side, 19), crops(side, 30)[11:]
    loop = torch.stack([ssim(x[None], b) for x in a])
    assert torch.allclose(pairwise_ssim(a, b, memory_mb=memory_mb), loop, atol=1e-5)


@pytest.mark.parametrize(("n", "m"), [(300, 2), (2, 300), (1, 1)])
def test_all_pairs_of_sets_of_any_size_on_flat_and_cut_images(n: int, m: int) -> None:
    a, b = crops(16, n), crops(16, n + m)[n:]
    a[0], b[0] = 0.9, 0.3  # flat: only the luminance differs
    b[-1, :, :, :8] = 1.0  # half of it flat
    loop = torch.stack([ssim(x[None], b) for x in a])
    assert torch.allclose(pairwise_ssim(a, b, memory_mb=1), loop, atol=1e-5)


def test_all_pairs_of_colour_images() -> None:
    a = torch.cat([photograph(*place) for place in PHOTOGRAPHS if place[3] == 64])
    loop = torch.tensor([[oracle(x[None], y[None]) for y in a] for x in a], dtype=torch.float32)
    assert torch.allclose(pairwise_ssim(a, a), loop, atol=1e-5)


def test_no_images_give_an_empty_matrix() -> None:
    assert pairwise_ssim(crops(16, 3), crops(16, 3)[:0]).shape == (3, 0)


def test_rows_equal_the_loop_and_are_one_on_the_diagonal() -> None:
    images = crops(24, 17)
    rows = SsimRows(images)
    matrix = torch.stack([rows.row(i) for i in range(len(rows))])
    assert torch.allclose(matrix, torch.stack([ssim(x[None], images) for x in images]), atol=3e-5)
    assert torch.equal(matrix.diagonal(), torch.ones(17))


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (torch.rand(2, 1, 16, 16), torch.rand(2, 1, 16, 17), "one shape"),
        (torch.rand(2, 1, 16, 16), torch.rand(3, 1, 16, 16), "one shape"),
        (torch.rand(1, 16, 16), torch.rand(1, 16, 16), "one shape"),
        (torch.rand(1, 1, 10, 16), torch.rand(1, 1, 10, 16), "at least 11"),
        (torch.rand(1, 1, 16, 16) * 255, torch.rand(1, 1, 16, 16), "scale the images"),
        (torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16) * 2 - 1, "scale the images"),
        (torch.full((1, 1, 16, 16), torch.nan), torch.rand(1, 1, 16, 16), "scale the images"),
    ],
)
def test_bad_input_is_named(x: Tensor, y: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ssim(x, y)


def test_all_pairs_refuse_other_shapes_and_no_memory() -> None:
    with pytest.raises(ValueError, match="one shape"):
        pairwise_ssim(torch.rand(1, 1, 16, 16), torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="memory_mb"):
        pairwise_ssim(torch.rand(1, 1, 16, 16), torch.rand(1, 1, 16, 16), memory_mb=0)
