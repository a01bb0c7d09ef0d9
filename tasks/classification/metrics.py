"""From logits to predictions. Accuracies are functions of counts and live with ``SessionAccuracy``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tasks.records import Prediction


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the best other logit: [n] of logits [n, k] and labels [n]; k >= 2."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return own - others.max(1).values


def predictions_from_logits(
    ids: Sequence[str], labels: Tensor, logits: Tensor, seen: Sequence[int]
) -> list[Prediction]:
    """Classify among the classes seen so far; of equal logits the lowest class wins.

    Args:
        ids: n picture ids.
        labels: int64 [n], each in ``seen``.
        logits: [n, k]; finite at the classes in ``seen``, other columns are ignored.
        seen: At least two classes.

    Raises:
        ValueError: Lengths differ, fewer than two classes, a label outside ``seen``, a logit not finite.
    """
    if not len(ids) == len(labels) == len(logits):
        raise ValueError(
            f"{len(ids)} ids, {len(labels)} labels and {len(logits)} rows of logits do not match"
        )
    if len(seen) < 2:
        raise ValueError(f"predictions need at least two classes seen, got {list(seen)}")
    classes = torch.tensor(sorted(seen))
    if unseen := sorted(set(labels.tolist()) - set(seen)):
        raise ValueError(f"label {unseen[0]} is not among the classes seen, {sorted(seen)}")
    known = logits.detach().float().cpu()[:, classes]
    if not torch.isfinite(known).all():
        bad = int((~torch.isfinite(known)).any(1).nonzero()[0])
        raise ValueError(
            f"the classifier gave picture {ids[bad]!r} a logit that is not finite; training diverged"
        )
    columns = torch.searchsorted(classes, labels.cpu())
    predicted = classes[known.argmax(1)].tolist()
    rows = zip(ids, labels.tolist(), predicted, margins(known, columns).tolist(), strict=True)
    return [Prediction(image_id=i, label=y, predicted=p, margin=m) for i, y, p, m in rows]
