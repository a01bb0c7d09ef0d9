"""Fine-tuning with the prototype classifier psi: the paper's downstream model and its first baseline.

A session's head is a cosine softmax over all classes seen. Its rows start at the prototypes: the stored ones
of earlier classes, the class means of the new ones. Backbone and rows are trained by cross entropy; then
the new classes' prototypes are made anew with the trained backbone, and prediction compares with prototypes.

Nothing is kept of earlier sessions but one vector a class, and training moves the features away from under
it: without pictures of earlier classes that is the forgetting of the paper's first row. Generated pictures
of earlier classes (data-free replay) hold the features in place, and by their own movement
G_c(after) - G_c(before) they tell how far the stored prototype has moved (``old_prototypes: drift``).

Trains: backbone and head, in every session.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from tasks.classification.backbone import BackboneSettings, load_backbone
from tasks.classification.prototypes import class_sums, prototypes
from tasks.classification.training import CosineHead, TrainingSettings, fit
from tasks.learners.base import Progress, TrainingData
from tasks.learners.prototype import PrototypeLearner
from tasks.learners.sessions import of_shape, take_weights, weights_of
from tasks.records import Frozen


class FinetuneProtoSettings(Frozen):
    """How the network is fine-tuned and its prototypes made.

    Attributes:
        kind: Chooses this learner.
        backbone: Pre-trained weights to start from.
        temperature: Factor of the cosine in the softmax.
        generated_weight: Share of the generated pictures in a new class's prototype, in [0, 1].
        old_prototypes: What replayed pictures of an earlier class do to its prototype: ``drift`` moves it as
            they moved, ``generated`` puts their mean in its place, ``keep`` leaves it.
        base: Training of the base session.
        incremental: Training of the later sessions.
    """

    kind: Literal["finetune_proto"]
    backbone: BackboneSettings
    temperature: float = Field(gt=0)
    generated_weight: float = Field(ge=0, le=1)
    old_prototypes: Literal["drift", "generated", "keep"]
    base: TrainingSettings
    incremental: TrainingSettings


class FinetuneProto(PrototypeLearner):
    """A fine-tuned backbone with one prototype a class."""

    kind: ClassVar[str] = "finetune_proto"

    def __init__(self, settings: FinetuneProtoSettings, n_classes: int, device: torch.device) -> None:
        """Load the backbone.

        Raises:
            CheckpointError: There are no such weights.
        """
        backbone = load_backbone(settings.backbone)
        super().__init__(backbone, n_classes, settings.generated_weight, settings.temperature, device)
        self.settings = settings
        self.head_rows = torch.zeros_like(self.rows)

    def learn(self, data: TrainingData, *, seed: int, progress: Progress | None = None) -> list[float]:
        """Train backbone and head, then renew the prototypes; returns each pass's mean cross entropy."""
        self._refuse_bad(data)
        self._start_session(data)
        replayed = data.of(~torch.isin(data.labels, torch.tensor(self.new)))
        before = self._means(replayed)
        losses = self._train(data, seed, progress)
        self._update_prototypes(data)
        self._move_old(replayed, before)
        return losses

    # ------------------------------------------------------------------------------ steps

    def _start_session(self, data: TrainingData) -> None:
        """Put the head's rows on the prototypes, once a session."""
        fresh = [c for c in self.new if c not in self.known]
        if not fresh:
            return
        features = self.features(data.images)
        made = prototypes(features, data.labels, data.is_generated, self.n_classes, self.generated_weight)
        self.head_rows = self.rows.clone()
        self.head_rows[fresh] = made[fresh]

    def _train(self, data: TrainingData, seed: int, progress: Progress | None) -> list[float]:
        seen = torch.tensor(self.seen)
        head = CosineHead(self.head_rows[seen], self.settings.temperature).to(self.device)
        training = self.settings.base if self.new == self.seen else self.settings.incremental
        columns = torch.searchsorted(seen, data.labels)
        losses = fit(self.backbone, head, data.images, columns, balanced(columns), training, seed, progress)
        self.head_rows[seen] = head.rows.detach().cpu()
        return losses

    def _means(self, data: TrainingData) -> Tensor:
        """Mean normalised features by class [n_classes, d]; zero rows where there are no pictures."""
        sums, counts = class_sums(self.features(data.images), data.labels, self.n_classes)
        return sums / counts.clamp(min=1)[:, None]

    def _move_old(self, replayed: TrainingData, before: Tensor) -> None:
        old = sorted(set(replayed.labels.tolist()))
        if not old or self.settings.old_prototypes == "keep":
            return
        after = self._means(replayed)
        if self.settings.old_prototypes == "drift":
            self.rows[old] = normalize(self.rows[old] + after[old] - before[old], dim=1)
        else:
            self.rows[old] = normalize(after[old], dim=1)

    # ------------------------------------------------------------------------------ checkpoints

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), "head": self.head_rows, **weights_of("backbone", self.backbone)}

    def _take(self, tensors: dict[str, Tensor]) -> None:
        super()._take(tensors)
        self.head_rows = of_shape(tensors, "head", self.head_rows)
        take_weights("backbone", self.backbone, tensors)


def balanced(labels: Tensor) -> Tensor:
    """Weights [n] by which every class that is present counts the same; their mean is 1."""
    counts = torch.bincount(labels)
    present = (counts > 0).sum()
    return len(labels) / (present * counts[labels])
