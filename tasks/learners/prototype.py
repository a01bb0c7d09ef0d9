"""What learners with the prototype classifier psi share: memory is one vector a class."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from tasks.classification.backbone import Backbone
from tasks.classification.prototypes import cosine_logits, leave_one_out_logits, only_seen, prototypes
from tasks.learners.base import Memory, TrainingData
from tasks.learners.sessions import SessionLearner, of_shape


class PrototypeLearner(SessionLearner):
    """Cosine to one unit vector a class. Subclasses say how an epoch is learned and what else is stored."""

    memory: ClassVar[Memory] = "prototypes"

    def __init__(
        self,
        backbone: Backbone,
        n_classes: int,
        generated_weight: float,
        temperature: float,
        device: torch.device,
    ) -> None:
        """Start without any class known; ``backbone`` is moved to ``device`` and belongs to the learner."""
        super().__init__(backbone, n_classes, device)
        self.generated_weight = generated_weight
        self.temperature = temperature
        self.rows = torch.zeros(n_classes, backbone.width)

    def _update_prototypes(self, data: TrainingData) -> None:
        """Make the rows of the new classes from ``data``; rows of earlier classes stay."""
        features = self.features(data.images)
        made = prototypes(features, data.labels, data.is_generated, self.n_classes, self.generated_weight)
        new = torch.tensor(self.new)
        self.rows[new] = self._placed(made[new], new)
        self.known |= set(self.new)

    def _placed(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Where class means [m, d] of ``classes`` [m] are put; here, where they are."""
        return rows

    def predict(self, images: Tensor, seen: Sequence[int]) -> Tensor:
        """See :meth:`Learner.predict`."""
        self._refuse_unknown(seen)
        return only_seen(cosine_logits(self.features(images), self.rows, self.temperature), tuple(seen))

    def predict_shots(self, data: TrainingData, seen: Sequence[int]) -> Tensor:
        """See :meth:`Learner.predict_shots`; the rule stands in ``tasks.classification.prototypes``."""
        self._refuse_unknown(seen)
        logits = leave_one_out_logits(
            self.features(data.images),
            data.labels,
            data.is_generated,
            self.rows,
            self.generated_weight,
            self.temperature,
            self._placed,
        )
        return only_seen(logits, tuple(seen))

    def _tensors(self) -> dict[str, Tensor]:
        return {"prototypes": self.rows}

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self.rows = of_shape(tensors, "prototypes", self.rows)
