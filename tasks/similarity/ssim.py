"""SSIM of Wang et al. 2004 (Eq. 5 and 7 of the paper), for pairs and for all pairs of two sets.

The window is an 11-tap Gaussian of sigma 1.5; covariances are those of the population; only positions
where the window lies inside the image count; the data range is 1; channels are averaged. Nothing is
computed in half precision, where the local variances cancel to noise: pairs are compared in float64 (in
float32 large flat regions cost 2e-5), all pairs of two sets in float32 around each window's own mean.

    S(p) = (2 mu_x mu_y + C1) (2 cov_xy + C2) / ((mu_x^2 + mu_y^2 + C1) (var_x + var_y + C2))

SSIM is a similarity: 1 for equal images, at least -1. ``ssim_distance`` = 1 - SSIM is what losses and
farthest points use.
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

TAPS, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
TOLERANCE = 1e-3
"""How far outside [0, 1] a value may lie before it is refused as another range."""

_CACHE_BYTES = 1 << 22  # of scratch a block may use to stay in a core's cache


def ssim(x: Float[Tensor, "n c h w"], y: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """SSIM of each image with its counterpart; differentiable in both.

    Args:
        x: [n, c, h, w] in [0, 1], of any floating type; h and w at least 11.
        y: The same shape. One of the two may have n = 1.

    Returns:
        [n] in [-1, 1], float32 (float64 if an input is).

    Raises:
        ValueError: shapes differ, a side is shorter than 11, or (only where no gradient is asked for, so
            that a decoder's overshoot can be scored) a value is NaN or outside [0, 1].
    """
    _check_shapes(x, y)
    with torch.autocast(x.device.type, enabled=False):
        a, b = x.double(), y.double()
        mu_a, mu_b = _smooth(a), _smooth(b)
        var_a, var_b = _smooth(a * a) - mu_a**2, _smooth(b * b) - mu_b**2
        local = _combine(mu_a, mu_b, var_a, var_b, _smooth(a * b) - mu_a * mu_b)
        wider = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        return local.mean(dim=(1, 2, 3)).to(wider)


def ssim_distance(x: Float[Tensor, "n c h w"], y: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """1 - SSIM of each image with its counterpart: [n] in [0, 2], 0 for equal images."""
    return 1 - ssim(x, y)


class SsimRows:
    """SSIM of one image of a set with all of them, a row at a time; rows asked for are remembered.

    Each image's local means and variances are computed once; a row costs one cross term for each image.
    """

    def __init__(self, images: Float[Tensor, "n c h w"]) -> None:
        """Args: images: [n, c, h, w] in [0, 1], sides at least 11. Raises ValueError as :func:`ssim`."""
        _check_shapes(images, images)
        # (co)variances do not change under a shift, and around 1/2 the squares cancel less
        self._shifted = images.float() - 0.5
        self._mean = _smooth(self._shifted)
        self._var = _smooth(self._shifted**2) - self._mean**2
        self._rows: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._shifted)

    def row(self, i: int) -> Float[Tensor, " n"]:
        """SSIM of image ``i`` with every image, [n] in [-1, 1]; exactly 1 with itself."""
        if i not in self._rows:
            cov = _smooth(self._shifted[i] * self._shifted) - self._mean[i] * self._mean
            local = _combine(self._mean[i] + 0.5, self._mean + 0.5, self._var[i], self._var, cov)
            row = local.mean(dim=(1, 2, 3))
            row[i] = 1.0
            self._rows[i] = row
        return self._rows[i]


@torch.no_grad()
def pairwise_ssim(
    a: Float[Tensor, "n_a c h w"], b: Float[Tensor, "n_b c h w"], *, memory_mb: int = 256
) -> Float[Tensor, "n_a n_b"]:
    """SSIM of every image of ``a`` with every image of ``b``.

    At one window position the covariances of all pairs are one matrix product of centred, weighted
    windows, and the denominator is one of rank four; tiles are small enough to stay in cache.

    Args:
        a: [n_a, c, h, w] in [0, 1], sides at least 11.
        b: [n_b, c, h, w] in [0, 1], the same c, h and w.
        memory_mb: scratch memory, in MiB, beyond inputs and result.

    Returns:
        [n_a, n_b] in [-1, 1], float32.

    Raises:
        ValueError: as :func:`ssim`, or ``memory_mb`` < 1.
    """
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"pairwise_ssim needs images of one shape, got {list(a.shape)} and {list(b.shape)}")
    if memory_mb < 1:
        raise ValueError(f"memory_mb must be at least 1, got {memory_mb}")
    _check_shapes(a, a)
    _check_shapes(b, b)
    result = a.new_zeros(len(a), len(b), dtype=torch.float32)
    tile = max(16, min(256, int((memory_mb * 2**20 / 4 / 16) ** 0.5)))
    with torch.autocast(a.device.type, enabled=False):
        for i in range(0, len(a), tile):
            for j in range(0, len(b), tile):
                part = result[i : i + tile, j : j + tile]
                _add_tile(part, a[i : i + tile].float(), b[j : j + tile].float())
    return result


def _add_tile(out: Float[Tensor, "n m"], a: Float[Tensor, "n c h w"], b: Float[Tensor, "m c h w"]) -> None:
    """Write the mean of S(p) over all positions and channels of every pair into ``out``."""
    channels, rows, columns = a.shape[1], a.shape[2] - TAPS + 1, a.shape[3] - TAPS + 1
    pairs = len(a) * len(b)
    step = max(1, min(columns, _CACHE_BYTES // 4 // (3 * pairs + TAPS**2 * (len(a) + len(b)))))
    if a.device.type != "cpu":
        step = columns
    for channel in range(channels):
        for row in range(rows):
            for left in range(0, columns, step):
                right = min(left + step, columns) + TAPS - 1
                view = (slice(None), channel, slice(row, row + TAPS), slice(left, right))
                out += _position_sums(a[view], b[view])
    out /= channels * rows * columns


def _position_sums(a: Float[Tensor, "n 11 w"], b: Float[Tensor, "m 11 w"]) -> Float[Tensor, "n m"]:
    """Sum of S(p) over the window positions along one row of windows, for all pairs."""
    mu_a, var_a, windows_a = _windows(a)
    mu_b, var_b, windows_b = _windows(b)
    p_a, p_b = mu_a**2 + C1 / 2, mu_b**2 + C1 / 2
    q_a, q_b = var_a + C2 / 2, var_b + C2 / 2
    ones_a, ones_b = torch.ones_like(mu_a), torch.ones_like(mu_b)
    # (p_a + p_b)(q_a + q_b), all terms positive, and 2 mu_a mu_b + C1
    below = _outer((p_a * q_a, p_a, q_a, ones_a), (ones_b, q_b, p_b, p_b * q_b))
    luminance = _outer((mu_a * 2, ones_a), (mu_b, ones_b * C1))
    above = torch.baddbmm(a.new_full((1, 1, 1), C2), windows_a, windows_b.transpose(1, 2), alpha=2)
    return above.mul_(luminance).div_(below).sum(0)


def _outer(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Float[Tensor, "p n m"]:
    return torch.stack(left, dim=-1) @ torch.stack(right, dim=-2)


def _windows(
    images: Float[Tensor, "n 11 w"],
) -> tuple[Float[Tensor, "p n"], Float[Tensor, "p n"], Float[Tensor, "p n 121"]]:
    """Local means and variances, and the windows centred and weighted so that products are covariances."""
    taps = _taps(images.dtype, images.device)
    weights = torch.outer(taps, taps).flatten()
    patches = images.unfold(2, TAPS, 1).permute(2, 0, 1, 3).flatten(2)  # [p, n, 121]
    mean = patches @ weights
    centred = (patches - mean[..., None]) * weights.sqrt()
    return mean, centred.square().sum(-1), centred


def _combine(mu_x: Tensor, mu_y: Tensor, var_x: Tensor, var_y: Tensor, cov: Tensor) -> Tensor:
    """S(p) from local statistics of any one broadcastable shape."""
    luminance = (2 * mu_x * mu_y + C1) / (mu_x**2 + mu_y**2 + C1)
    return luminance * (2 * cov + C2) / (var_x + var_y + C2)


def _smooth(z: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n h-10 w-10"]:
    """Gaussian-weighted local means: one banded matrix along each axis."""
    h, w = z.shape[-2:]
    return _band(h, z.dtype, z.device) @ z @ _band(w, z.dtype, z.device).mT


@lru_cache(maxsize=16)
def _taps(dtype: torch.dtype, device: torch.device) -> Float[Tensor, " 11"]:
    offsets = torch.arange(TAPS, dtype=torch.float64) - TAPS // 2
    exact = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    taps = (exact / exact.sum()).to(dtype)
    # rounded taps must still sum to 1, or flat regions get a variance: the smallest have bits to spare
    taps[[0, -1]] += ((1 - taps.double().sum()) / 2).to(dtype)
    return taps.to(device)


@lru_cache(maxsize=16)
def _band(side: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "side-10 side"]:
    """[side - 10, side]: row r holds the taps at columns r to r + 10."""
    band = torch.zeros(side - TAPS + 1, side, dtype=dtype, device=device)
    for row in range(len(band)):
        band[row, row : row + TAPS] = _taps(dtype, device)
    return band


def _check_shapes(x: Tensor, y: Tensor) -> None:
    shapes = f"{list(x.shape)} and {list(y.shape)}"
    matched = len(x) == len(y) or 1 in (len(x), len(y))
    if not (x.ndim == y.ndim == 4 and x.shape[1:] == y.shape[1:] and matched):
        raise ValueError(f"SSIM needs two batches [n, c, h, w] of one shape, got {shapes}")
    if min(x.shape[-2:]) < TAPS:
        raise ValueError(
            f"SSIM needs sides of at least {TAPS} pixels, got {shapes}; enlarge the images first"
        )
    for images in (x, y) if x is not y else (x,):
        if not images.requires_grad and images.numel():
            _check_range(images)


def _check_range(images: Tensor) -> None:
    low, high = (float(v) for v in torch.aminmax(images))
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        raise ValueError(f"SSIM needs values in [0, 1], got [{low:.4g}, {high:.4g}]; scale the images first")
