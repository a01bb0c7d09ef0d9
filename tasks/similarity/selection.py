"""Which images stand for the others: farthest points, their clusters, and the hardest negatives.

Paper, "The VLM Coordinator" (farthest point sampling with SSIM, then clustering) and "Self-contrastive
finetuning strategy" (the generated images most similar to a failure are its negatives).

The distance is 1 - SSIM, which gives the picks of -SSIM. It is no metric in general, so nothing is claimed of
the cover. Everything is deterministic: the first centre is the image nearest to the mean image, ties go to
the lowest index, and picking stops once every image is within ``gap`` of a centre. K centres cost K rows.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from tasks.images import to_greyscale
from tasks.records import Frozen
from tasks.similarity.ssim import TAPS

Rows = Callable[[int], Float[Tensor, " n"]]
"""Similarities in [-1, 1] of one image to every image, such as ``SsimRows(images).row``."""

_ROWS, _COLUMNS = 64, 512  # of all images' pixels, taken at once


class MiningSettings(Frozen):
    """What is selected, and at which resolution images are compared.

    ``memory_mb`` bounds what mining a class needs beyond its images; it is no part of what is recorded.
    """

    centres: int = Field(ge=1)
    negatives: int = Field(ge=1, le=8)
    ssim_size: int = Field(ge=TAPS)
    min_contrast: float = Field(ge=0, lt=1)
    greyscale: bool
    gap: float = Field(ge=0, le=2)
    inherit: Literal["correct", "all"]
    pairs: Literal["all", "nearest"]
    memory_mb: int = Field(default=256, ge=4, exclude=True)


def prepare(images: Float[Tensor, "n 3 h w"], settings: MiningSettings) -> Float[Tensor, "n c s s"]:
    """Images as they are compared: ``ssim_size`` pixels a side, grey if so set.

    Args:
        images: [n, 3, h, w] in [0, 1]; n may be 0.
        settings: ``ssim_size`` and ``greyscale``.

    Returns:
        [n, 1 or 3, ssim_size, ssim_size] in [0, 1].
    """
    pixels = to_greyscale(images) if settings.greyscale else images
    side = (settings.ssim_size, settings.ssim_size)
    if pixels.shape[-2:] == side or len(pixels) == 0:
        return pixels.new_zeros(0, pixels.shape[1], *side) if len(pixels) == 0 else pixels
    return functional.interpolate(pixels, side, mode="bilinear", antialias=True).clamp(0, 1)


def is_broken(images: Float[Tensor, "n c h w"], min_contrast: float) -> Bool[Tensor, " n"]:
    """Near-constant images, which farthest points would pick first.

    Args:
        images: [n, c, h, w] in [0, 1].
        min_contrast: an image is broken if no channel's standard deviation over its pixels reaches this.
    """
    if len(images) == 0:
        return torch.zeros(0, dtype=torch.bool, device=images.device)
    return images.float().flatten(2).std(dim=2, correction=0).amax(dim=1) < min_contrast


def start_index(images: Float[Tensor, "n c h w"]) -> int:
    """The image nearest (Euclidean, over pixels) to the mean of all; the lowest index of equals.

    Raises:
        ValueError: no image, or NaN.
    """
    if len(images) == 0:
        raise ValueError("start_index needs at least one image, got none")
    flat = images.flatten(1)  # in double precision a part at a time
    mean = torch.cat([columns.double().mean(0) for columns in flat.split(_COLUMNS, dim=1)])
    far = torch.cat([(rows.double() - mean).square().sum(1) for rows in flat.split(_ROWS)])
    return _lowest_argmin(_finite(far, "an image"))


def farthest_points(rows: Rows, n: int, start: int, k: int, gap: float) -> list[int]:
    """Greedy farthest points under the distance 1 - similarity.

    Args:
        rows: similarities of one image to all n; called once for each centre.
        n: how many images there are.
        start: the first centre.
        k: at most so many centres; all n if k >= n and no two are within ``gap``.
        gap: stop once no image is farther than this from its nearest centre; 0 stops at duplicates.

    Returns:
        Indices in the order of picking, no index twice.

    Raises:
        ValueError: n or k below 1, ``start`` outside 0..n-1, a row of another length, or NaN in a row.
    """
    if n < 1 or k < 1 or not 0 <= start < n:
        raise ValueError(f"farthest_points needs n >= 1, k >= 1 and 0 <= start < n, got {n=}, {k=}, {start=}")
    picks = [start]
    nearest = _distances(rows, start, n)
    while len(picks) < min(k, n):
        pick = _lowest_argmin(-nearest)
        if float(nearest[pick]) <= gap:
            break
        picks.append(pick)
        nearest = torch.minimum(nearest, _distances(rows, pick, n))
    return picks


def assign_clusters(rows: Rows, n: int, centres: list[int]) -> Int[Tensor, " n"]:
    """The most similar centre of every image: [n] of positions in ``centres``; a centre belongs to itself.

    Raises:
        ValueError: no centre, one outside 0..n-1, or NaN in a row.
    """
    if not centres or not all(0 <= c < n for c in centres):
        raise ValueError(f"assign_clusters needs centres within 0..{n - 1}, got {centres}")
    distances = torch.stack([_distances(rows, centre, n) for centre in centres])
    owner = torch.tensor([_lowest_argmin(column) for column in distances.unbind(1)])
    owner[torch.tensor(centres)] = torch.arange(len(centres))
    return owner


def compared_with(similarities: Float[Tensor, "m c"], pairs: Literal["all", "nearest"]) -> list[list[int]]:
    """For each of c centres, which of m failures it is compared with.

    Args:
        similarities: [m, c] of failures and centres, at least one of each.
        pairs: ``all``; or ``nearest``: a centre's own most similar failure, and every failure whose most similar
            centre it is, so that neither a centre nor a failure is left out. Ties go to the lowest index.

    Returns:
        c lists of ascending indices, none empty.

    Raises:
        ValueError: NaN.
    """
    m, c = _finite(similarities, "a similarity").shape
    if pairs == "all":
        return [list(range(m)) for _ in range(c)]
    nearest_failure = [_lowest_argmin(-column) for column in similarities.unbind(1)]
    nearest_centre = [_lowest_argmin(-row) for row in similarities.unbind(0)]
    return [[i for i in range(m) if i == nearest_failure[j] or nearest_centre[i] == j] for j in range(c)]


def hardest_negatives(similarities: Float[Tensor, "m n"], k: int) -> list[list[int]]:
    """For each of m positives, its k most similar candidates, most similar first, ties by lowest index.

    Args:
        similarities: [m, n]; n may be below k, or 0.
        k: at least 1.

    Raises:
        ValueError: NaN, or k below 1.
    """
    if k < 1:
        raise ValueError(f"hardest_negatives needs k >= 1, got {k}")
    order = _finite(similarities, "a similarity").sort(dim=1, descending=True, stable=True).indices
    return [[int(i) for i in row[:k]] for row in order]


def _distances(rows: Rows, i: int, n: int) -> Float[Tensor, " n"]:
    row = rows(i)
    if row.shape != (n,):
        raise ValueError(f"row {i} of the similarities has shape {list(row.shape)}, expected [{n}]")
    distance = 1 - _finite(row, f"row {i} of the similarities")
    distance[i] = 0
    return distance


def _finite(values: Tensor, what: str) -> Tensor:
    if torch.isnan(values).any():
        raise ValueError(f"{what} holds NaN; remove broken images (is_broken) before selecting")
    return values


def _lowest_argmin(values: Float[Tensor, " n"]) -> int:
    """The first index of the smallest value; torch's argmin promises no order among equals."""
    return int((values == values.min()).nonzero()[0])
