r"""The prototype classifier psi: a class is the mean direction of its features (paper, Experiment Settings).

    u_i   = f(x_i) / |f(x_i)|
    R_c   = mean of u_i over the real pictures of class c,   G_c = the same over its generated pictures
    p_c   = normalise(w G_c + (1 - w) R_c), or of the one that exists
    logit = temperature * <u, p_c>

Leave-one-out: a shot must not be recognised by its own trace, so it is compared with its class's prototype
made without it, R_c being the mean of the other shots. If it was the only one, G_c alone stands for the
class; if there is no G_c either, the class has nothing but the shot, and its similarity counts as -1, the
least there is: such a shot is always an error, which says that nothing is known about it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

LEAST_SIMILARITY = -1.0


def class_sums(features: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """Sums of normalised features [n, d] by label [n]: float [n_classes, d], and counts [n_classes]."""
    member = one_hot(labels, n_classes).to(features.dtype)
    return member.T @ normalize(features, dim=1), member.sum(0)


def mix(real: tuple[Tensor, Tensor], generated: tuple[Tensor, Tensor], generated_weight: float) -> Tensor:
    """Unit prototypes [k, d] of sums [k, d] and counts [k]; a class with neither kind gets a zero row."""
    has_real, has_generated = real[1] > 0, generated[1] > 0
    weight = torch.where(has_real & has_generated, generated_weight, has_generated.float())[:, None]
    means = [sums / counts.clamp(min=1)[:, None] for sums, counts in (real, generated)]
    return normalize(weight * means[1] + (1 - weight) * means[0], dim=1)


def prototypes(
    features: Tensor, labels: Tensor, is_generated: Tensor, n_classes: int, generated_weight: float
) -> Tensor:
    """Prototypes of the classes that have pictures.

    Args:
        features: [n, d], not normalised.
        labels: int64 [n] in [0, n_classes).
        is_generated: bool [n].
        n_classes: Rows of the result.
        generated_weight: w in [0, 1], for classes that have both kinds.

    Returns:
        [n_classes, d] unit rows; the row of a class without pictures is zero.
    """
    real, generated = (
        class_sums(features[part], labels[part], n_classes) for part in (~is_generated, is_generated)
    )
    return mix(real, generated, generated_weight)


def cosine_logits(features: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """``temperature`` times the cosine of features [n, d] and rows [k, d]: [n, k]."""
    return temperature * normalize(features, dim=1) @ normalize(rows, dim=1).T


def rows_without(
    features: Tensor, labels: Tensor, is_generated: Tensor, n_classes: int, generated_weight: float
) -> tuple[Tensor, Tensor]:
    """For each real picture its class's prototype made without it, and whether anything was left to make it of.

    Returns:
        [m, d] unit rows, and bool [m]; the m real pictures in their order.
    """
    real, generated = (
        class_sums(features[part], labels[part], n_classes) for part in (~is_generated, is_generated)
    )
    shots, own = normalize(features[~is_generated], dim=1), labels[~is_generated]
    others = real[0][own] - shots, real[1][own] - 1
    without = mix(others, (generated[0][own], generated[1][own]), generated_weight)
    return without, (others[1] + generated[1][own]) > 0


def leave_one_out_logits(
    features: Tensor,
    labels: Tensor,
    is_generated: Tensor,
    rows: Tensor,
    generated_weight: float,
    temperature: float,
    placed: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Logits of every real picture, its own class's prototype made without it (see the module).

    Args:
        features: [n, d] of real and generated pictures.
        labels: int64 [n].
        is_generated: bool [n].
        rows: [k, d] prototypes of all classes; those of other classes are used as they are.
        generated_weight: w in [0, 1].
        temperature: Factor of the cosine.
        placed: What else is done to prototypes [m, d] of classes [m] before they are compared with.

    Returns:
        [m, k], the m real pictures in their order.
    """
    shots, own = normalize(features[~is_generated], dim=1), labels[~is_generated]
    without, anything_left = rows_without(features, labels, is_generated, len(rows), generated_weight)
    if placed is not None:
        without = placed(without, own)
    similarity = torch.where(anything_left, (shots * without).sum(1), LEAST_SIMILARITY)
    logits = cosine_logits(features[~is_generated], rows, temperature)
    logits[torch.arange(len(own)), own] = temperature * similarity
    return logits


def only_seen(logits: Tensor, seen: tuple[int, ...]) -> Tensor:
    """A copy of logits [n, k] with minus infinity at the classes that are not in ``seen``."""
    masked = torch.full_like(logits, float("-inf"))
    columns = torch.tensor(seen, dtype=torch.int64, device=logits.device)
    masked[:, columns] = logits[:, columns]
    return masked
