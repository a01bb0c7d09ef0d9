"""How far one set of feature vectors is from another: the squared MMD with the cubic kernel of KID.

Maximum mean discrepancy (Gretton et al. 2012, Lemma 6, the unbiased estimator) with the kernel of the Kernel
Inception Distance (Binkowski et al. 2018, "Demystifying MMD GANs", section 4):

    k(x, y) = (x . y / d + 1)^3
    MMD^2   = mean of k over pairs within x + the same within y - 2 mean of k between x and y

Unbiased, it is 0 in the mean for two samples of one distribution, at any sample size, and may be below 0; a
Frechet distance, in contrast, needs more samples than features, and a class of a few shots has five.
"""

import torch
from jaxtyping import Float
from torch import Tensor

DEGREE = 3


def polynomial_mmd(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Unbiased squared MMD of two samples with the cubic kernel; computed in float64.

    Args:
        x: n >= 2 feature vectors.
        y: m >= 2 feature vectors of the same length d.

    Returns:
        A number about 0 (it may be negative) for samples of one distribution, larger the further they differ;
        its unit is that of the features, so only distances in the same features can be compared.

    Raises:
        ValueError: another shape, fewer than two vectors, or a value that is not finite.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"features must be [n, d] and [m, d] with one d >= 1, got {list(x.shape)} and {list(y.shape)}"
        )
    if min(len(x), len(y)) < 2:
        raise ValueError(f"the unbiased estimate needs 2 vectors of each sample, got {len(x)} and {len(y)}")
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("features hold NaN or infinite values and have no distance")
    a, b = x.double(), y.double()
    return float(_within(a) + _within(b) - 2 * _kernel(a, b).mean())


def _kernel(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
    return (x @ y.T / x.shape[1] + 1) ** DEGREE


def _within(x: Float[Tensor, "n d"]) -> Tensor:
    """Mean of the kernel over pairs of different vectors."""
    values = _kernel(x, x)
    return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))
