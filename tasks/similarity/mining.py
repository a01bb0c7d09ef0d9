"""One class's failures against its correct generations: pairs to compare, triplets to tune on, clusters.

Paper, "The VLM Coordinator" and "Self-contrastive finetuning strategy". Generated images that are near-constant
are left out first. Farthest points among the rest are compared with failures; the others join the centre
they resemble most. So may, with ``mining.inherit=all``, the class's generations that the classifier got wrong:
the paper samples among the right ones only and leaves open what becomes of the others' prompts; a prompt that
misled the one has misled the other. Each failure's negatives are the right generations most similar to it.

"Each selected image pair" is compared (Eq. 2); which pairs are selected the paper leaves open. With every failure
(``mining.pairs=all``) a centre nearly always differs from one of them: then every verdict is semantic, prompts never
settle, and a class with one failing shot ends with one prompt. With ``nearest`` ones they settle, as the paper reports.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tasks.records import AugmentedImage, Cluster, FailurePair, ImageRef, Triplet
from tasks.similarity.selection import (
    MiningSettings,
    assign_clusters,
    compared_with,
    farthest_points,
    hardest_negatives,
    is_broken,
    prepare,
    start_index,
)
from tasks.similarity.ssim import SsimRows, pairwise_ssim

_PAIR_BYTES = 4 + 12 + 8
"""Of one similarity while negatives are picked: itself, its place and value in order, the sort's own copy."""


@dataclass(frozen=True)
class Mined:
    """What one class gives; ``filtered`` counts the broken generations that were left out."""

    pairs: list[FailurePair]
    triplets: list[Triplet]
    clusters: list[Cluster]
    filtered: int


def mine_class(
    failures: Sequence[ImageRef],
    failure_images: Tensor,
    candidates: Sequence[AugmentedImage],
    candidate_images: Tensor,
    others: Sequence[AugmentedImage],
    other_images: Tensor,
    settings: MiningSettings,
) -> Mined:
    """Select for one class.

    Args:
        failures: m originals classified wrongly, all of one class.
        failure_images: [m, 3, h, w] in [0, 1].
        candidates: n generated images of that class classified rightly.
        candidate_images: [n, 3, h, w] in [0, 1].
        others: generated images of that class classified wrongly; never compared nor negatives, they may
            inherit a verdict.
        other_images: [o, 3, h, w] in [0, 1].
        settings: how many, at which size, who inherits.

    Returns:
        Nothing to compare or tune on where no candidate is left.

    Raises:
        ValueError: failures or candidates of another class, or NaN.
    """
    label = _one_label(failures, candidates)
    shown = prepare(candidate_images, settings)
    whole = (~is_broken(shown, settings.min_contrast)).nonzero().flatten()
    filtered = len(candidates) - len(whole)
    if len(whole) == 0:
        return Mined([], [], [], filtered)
    kept, shown = [candidates[i] for i in whole.tolist()], shown[whole]
    centres, owned = _clusters(shown, settings)
    members = [[kept[i].id for i in own] for own in owned]
    if settings.inherit == "all" and others:
        nearest = pairwise_ssim(prepare(other_images, settings), shown[centres]).argmax(1)
        for names, own in zip(members, _owned(nearest, len(centres)), strict=True):
            names += [others[i].id for i in own]
    to_centres, hardest = _against(failure_images, shown, centres, settings)
    return Mined(
        pairs=[
            FailurePair(
                label=label,
                original=failures[i],
                augmented_id=kept[centre].id,
                ssim=_rounded(to_centres[i, place]),
            )
            for place, (centre, compared) in enumerate(
                zip(centres, compared_with(to_centres, settings.pairs), strict=True)
            )
            for i in compared
        ],
        triplets=[
            Triplet(
                label=label,
                positive=failure,
                negatives=tuple(kept[i].id for i in negatives),
                ssims=tuple(negatives.values()),
            )
            for failure, negatives in zip(failures, hardest, strict=True)
        ],
        clusters=[
            Cluster(label=label, centre=kept[centre].id, members=tuple(names))
            for centre, names in zip(centres, members, strict=True)
        ],
        filtered=filtered,
    )


def _clusters(shown: Float[Tensor, "n c s s"], settings: MiningSettings) -> tuple[list[int], list[list[int]]]:
    """Farthest points, and the images nearest to each. What the rows needed is free again afterwards."""
    rows = SsimRows(shown).row
    centres = farthest_points(rows, len(shown), start_index(shown), settings.centres, settings.gap)
    return centres, _owned(assign_clusters(rows, len(shown), centres), len(centres))


def _against(
    failure_images: Float[Tensor, "m 3 h w"],
    shown: Float[Tensor, "n c s s"],
    centres: list[int],
    settings: MiningSettings,
) -> tuple[Float[Tensor, "m k"], list[dict[int, float]]]:
    """SSIM of each failure with each centre, and its hardest negatives with theirs; some failures at a time.

    Of the m x n similarities only what is returned is kept: memory does not grow with m n.
    """
    to_centres: list[Tensor] = []
    hardest: list[dict[int, float]] = []
    for part in failure_images.split(_at_once(shown, settings.memory_mb)):
        found = pairwise_ssim(prepare(part, settings), shown, memory_mb=max(1, settings.memory_mb * 3 // 4))
        to_centres.append(found[:, centres])
        for row, negatives in zip(found, hardest_negatives(found, settings.negatives), strict=True):
            hardest.append({i: _rounded(row[i]) for i in negatives})
    return torch.cat(to_centres), hardest


def _at_once(shown: Float[Tensor, "n c s s"], memory_mb: int) -> int:
    """How many failures fill a quarter of the memory, with their similarities sorted and their pixels prepared."""
    needed = _PAIR_BYTES * len(shown) + 2 * 4 * shown[0].numel()
    return max(1, memory_mb * 2**20 // 4 // needed)


def _one_label(failures: Sequence[ImageRef], candidates: Sequence[AugmentedImage]) -> int:
    labels = {image.label for image in failures} | {image.label for image in candidates}
    if len(labels) != 1 or not failures:
        raise ValueError(f"mining looks at one class with at least one failure, got labels {sorted(labels)}")
    return labels.pop()


def _owned(owners: Tensor, n: int) -> list[list[int]]:
    """Which indices each of n owners has."""
    return [(owners == owner).nonzero().flatten().tolist() for owner in range(n)]


def _rounded(value: Tensor) -> float:
    """Six digits: what two machines agree on."""
    return round(float(value), 6)
