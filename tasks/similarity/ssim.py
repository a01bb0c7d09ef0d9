"""SSIM of Wang et al. 2004 (Eq. 5 and 7 of the paper), for pairs and for all pairs of two sets.

The window is an 11-tap Gaussian of sigma 1.5; covariances are those of the population; only positions
where the window lies inside the image count; the data range is 1; channels are averaged. Nothing is
computed in half precision, where the local variances cancel to noise: pairs are compared in float64 (in
float32 large flat regions cost 2e-5), all pairs of two sets in float32 around one window's own mean.

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

_TILE_PAIRS = 1 << 16  # four float32 matrices of so many pairs stay in a core's cache of 1 to 2 MB
_ROW_CHUNK = 64  # images that a row is compared with at once, for the same reason
_PIXEL_BYTES = 64  # of scratch for each pixel of a tile's images: statistics in float64 and copies


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
            starts = range(0, len(self), _ROW_CHUNK)
            row = torch.cat([self._part(i, slice(start, start + _ROW_CHUNK)) for start in starts])
            row[i] = 1.0
            self._rows[i] = row
        return self._rows[i]

    def _part(self, i: int, part: slice) -> Float[Tensor, " m"]:
        """SSIM of image ``i`` with some of the images."""
        mean, var = self._mean[part], self._var[part]
        cov = _smooth(self._shifted[i] * self._shifted[part]) - self._mean[i] * mean
        local = _combine(self._mean[i] + 0.5, mean + 0.5, self._var[i], var, cov)
        return local.mean(dim=(1, 2, 3))


@torch.no_grad()
def pairwise_ssim(
    a: Float[Tensor, "n_a c h w"], b: Float[Tensor, "n_b c h w"], *, memory_mb: int = 256
) -> Float[Tensor, "n_a n_b"]:
    """SSIM of every image of ``a`` with every image of ``b``.

    At one window position the covariances of all pairs are one matrix product: windows of ``a``, weighted and
    centred, with those of ``b`` as they lie in memory, since a centred window sums a constant to zero. Both
    factors of the denominator are one product of rank four. What remains for each pair and position is one
    multiply-add and one division, on tiles that stay in a core's cache.

    Args:
        a: [n_a, c, h, w] in [0, 1], sides at least 11.
        b: [n_b, c, h, w] in [0, 1], the same c, h and w.
        memory_mb: scratch memory, in MiB, beyond inputs and result; the least is that of one pair of images.

    Returns:
        [n_a, n_b] in [-1, 1], float32.

    Raises:
        ValueError: as :func:`ssim`, or ``memory_mb`` < 1.
    """
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(f"pairwise_ssim needs images of one shape, got {list(a.shape)} and {list(b.shape)}")
    if memory_mb < 1:
        raise ValueError(f"memory_mb must be at least 1, got {memory_mb}")
    if len(a) > len(b):  # the first set's windows are copied, the second's are not
        return pairwise_ssim(b, a, memory_mb=memory_mb).mT.contiguous()
    _check_shapes(a, a)
    _check_shapes(b, b)
    result = a.new_zeros(len(a), len(b), dtype=torch.float32)
    rows, columns = _tile_sides(a, memory_mb)
    with torch.autocast(a.device.type, enabled=False):
        for tile_a, band in zip(a.split(rows), result.split(rows), strict=True):
            for tile_b, out in zip(b.split(columns), band.split(columns, dim=1), strict=True):
                _fill_tile(out, tile_a, tile_b)
    return result


def _tile_sides(a: Float[Tensor, "n c h w"], memory_mb: int) -> tuple[int, int]:
    """How many images of the first and of the second set are compared at once."""
    pairs = _TILE_PAIRS if a.device.type == "cpu" else _TILE_PAIRS * 64
    images = memory_mb * 2**20 // (_PIXEL_BYTES * a.shape[2] * a.shape[3])
    rows = max(1, min(len(a), int(pairs**0.5), images // 2, memory_mb * 2**20 // (32 * int(pairs**0.5))))
    return rows, max(1, min(pairs // rows, images - rows))


def _fill_tile(out: Float[Tensor, "n m"], a: Float[Tensor, "n c h w"], b: Float[Tensor, "m c h w"]) -> None:
    """Write the mean of S(p) over all positions and channels of every pair into ``out``."""
    total = out.new_zeros(out.shape, dtype=torch.float64)  # equal terms round alike: float32 holds one row's
    scratch = (*(out.new_empty(out.shape) for _ in range(4)), out.new_empty(TAPS**2, len(a)))
    for x, y in zip(a.unbind(1), b.unbind(1), strict=True):
        side_a, side_b = _PixelMajor(x), _PixelMajor(y)
        for row in range(len(side_a.mean)):
            total += _row_sums(scratch, side_a, side_b, row)
    positions = (a.shape[2] - TAPS + 1) * (a.shape[3] - TAPS + 1)
    out.copy_(total / (a.shape[1] * positions))


class _PixelMajor:
    """One channel of a tile's images with the image as the last index, and their local statistics."""

    def __init__(self, images: Float[Tensor, "n h w"]) -> None:
        """Statistics are taken in double precision: exact where an image is flat."""
        exact = images.double()
        mean = _smooth(exact)
        self.mean = mean.permute(1, 2, 0).float().contiguous()
        self.var = (_smooth(exact.square_()) - mean.square_()).permute(1, 2, 0).float().contiguous()
        self._pixels = images.permute(1, 2, 0).float().contiguous()

    def band(self, row: int) -> Float[Tensor, "w11 n"]:
        """The 11 image rows under one row of windows, column after column: each window is one slice."""
        return self._pixels[row : row + TAPS].transpose(0, 1).flatten(0, 1).contiguous()

    def denominator(self, row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of one row, for p = mu^2 + C1 / 2 and q = var + C2 / 2, the terms of (p_a + p_b)(q_a + q_b)."""
        p, q = self.mean[row] ** 2 + C1 / 2, self.var[row] + C2 / 2
        return p * q, p, q, torch.ones_like(p)


def _row_sums(scratch: tuple[Tensor, ...], a: _PixelMajor, b: _PixelMajor, row: int) -> Float[Tensor, "n m"]:
    """Sum of S(p) over the window positions of one row, for all pairs; lies in the scratch."""
    sums, cov, above, below, centred = scratch
    sums.zero_()
    band_a, band_b = a.band(row), b.band(row)
    weights = _window(sums.device)
    mean_a, mean_b = a.mean[row], b.mean[row]
    luminance_a = torch.stack((2 * C2 * mean_a, torch.full_like(mean_a, C1 * C2)), dim=2)
    luminance_b = torch.stack((mean_b, torch.ones_like(mean_b)), dim=1)
    below_a, below_b = torch.stack(a.denominator(row), dim=2), torch.stack(b.denominator(row)[::-1], dim=1)
    positions = zip(mean_a, luminance_a, luminance_b, below_a, below_b, strict=True)
    for column, (mean, left, right, left_below, right_below) in enumerate(positions):
        window = slice(column * TAPS, (column + TAPS) * TAPS)
        torch.sub(band_a[window], mean, out=centred).mul_(weights)
        torch.mm(centred.T, band_b[window], out=cov)
        torch.mm(left, right, out=above)
        above.addcmul_(above, cov, value=2 / C2)  # C2 (2 mu mu + C1) becomes (2 mu mu + C1) (2 cov + C2)
        torch.mm(left_below, right_below, out=below)
        sums.addcdiv_(above, below)
    return sums


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


@lru_cache(maxsize=4)
def _window(device: torch.device) -> Float[Tensor, "121 1"]:
    taps = _taps(torch.float64, device)
    return torch.outer(taps, taps).flatten()[:, None].float()


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
