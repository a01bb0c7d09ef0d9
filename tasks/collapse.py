"""Whether a generated set still shows anything: an adapter that has collapsed draws one colour from edge to edge.

Near-constant pictures are left out by mining, but the classifier would learn from them. A set that is mostly so is
refused before it is sealed, and nothing is trained on it; fewer are told by class, and stay.
"""

import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.images import as_unit
from tasks.records import AugmentedImage
from tasks.similarity.selection import is_broken

log = logging.getLogger("fscil.collapse")

LEAST_CONTRAST = 0.02
"""A picture is near-constant where no channel's standard deviation reaches this; values are in [0, 1]."""

MOST = 0.5
"""Share of near-constant pictures above which a set is refused."""

_AT_ONCE = 256


class CollapseError(ValueError):
    """The generator draws next to nothing any more."""


def refuse_collapse(
    images: Tensor, rows: Sequence[AugmentedImage], class_names: Sequence[str], adapted: bool
) -> None:
    """Look at a set before it is sealed.

    Args:
        images: uint8 [n, 3, s, s].
        rows: what the n images are.
        class_names: the category word of each label.
        adapted: whether an adapter drew them, and not the generator alone.

    Raises:
        CollapseError: more than :data:`MOST` of them are near-constant; names the classes and a prompt.
    """
    if not rows:
        return
    flat = torch.cat([is_broken(as_unit(part), LEAST_CONTRAST) for part in images.split(_AT_ONCE)]).tolist()
    broken = [row for row, is_flat in zip(rows, flat, strict=True) if is_flat]
    if not broken:
        return
    classes = Counter(class_names[row.label] for row in broken)
    said = (
        f"{len(broken)} of {len(rows)} generated images are near-constant "
        f"({', '.join(f'{name} {count}' for name, count in classes.items())}; one was asked for "
        f"{broken[0].prompt[:200]!r})"
    )
    if len(broken) > MOST * len(rows):
        remedy = (
            "the adapter has collapsed: lower tuning.learning_rate or tuning.updates, or raise tuning.anchor"
            if adapted
            else "look at generator.path, generator.guidance and the prompt"
        )
        raise CollapseError(f"{said}; {remedy}")
    log.warning("%s; mining leaves them out, the classifier learns from them", said)


def refuse_nan(images: Tensor, prompts: Sequence[str]) -> None:
    """Refuse images [n, 3, h, w] of which one is no picture at all.

    Raises:
        CollapseError: names its prompt.
    """
    bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero()
    if len(bad):
        raise CollapseError(
            f"the generator draws NaN or infinite values for the prompt {prompts[int(bad[0])][:200]!r}: lower "
            f"tuning.learning_rate, set generator.dtype=float32, or look at generator.path"
        )
