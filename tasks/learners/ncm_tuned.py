"""Fine-tune on the base session, then freeze: the decoupled baseline of few-shot class-incremental learning.

Measured by Chi Zhang, Nan Song, Guosheng Lin, Yun Zheng, Pan Pan, Yinghui Xu, "Few-Shot Incremental Learning
with Continually Evolved Classifiers", CVPR 2021, as the stage before their graph. A cosine softmax is trained
with the backbone on the base classes; after that no weight moves, and a class is the mean direction of its
features. Nothing can be forgotten, and what a new class is worth is what the base classes taught the
features.

Deviations from that paper: Adam with a cosine schedule on a pre-trained ViT (``as_published``: their SGD, its
steps down replaced by the cosine); the head restarts at the class means in each epoch of the loop; generated
pictures.

Trains: the backbone in the base session, nothing later.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from tasks.classification.backbone import BackboneSettings, load_backbone
from tasks.classification.prototypes import prototypes
from tasks.classification.training import CosineHead, RecipeSettings, fit
from tasks.learners.base import Progress, TrainingData
from tasks.learners.finetune_proto import balanced
from tasks.learners.prototype import PrototypeLearner
from tasks.learners.sessions import take_weights, weights_of
from tasks.records import Frozen


class TunedSettings(Frozen):
    """What learners share that train the backbone in the base session only.

    Attributes:
        backbone: Pre-trained weights to start from.
        temperature: Factor of the cosine in the softmax and in logits.
        generated_weight: Share of the generated pictures in a prototype, in [0, 1].
        base: Training of the base session.
    """

    backbone: BackboneSettings
    temperature: float = Field(gt=0)
    generated_weight: float = Field(ge=0, le=1)
    base: RecipeSettings


class NcmTunedSettings(TunedSettings):
    """``kind`` chooses this learner."""

    kind: Literal["ncm_tuned"]


class NcmTuned(PrototypeLearner):
    """Class means of a backbone that is trained in the base session and then frozen."""

    kind: ClassVar[str] = "ncm_tuned"

    def __init__(self, settings: TunedSettings, n_classes: int, device: torch.device) -> None:
        """Load the backbone.

        Raises:
            CheckpointError: There are no such weights.
        """
        backbone = load_backbone(settings.backbone)
        super().__init__(backbone, n_classes, settings.generated_weight, settings.temperature, device)
        self.base = settings.base

    @property
    def in_base_session(self) -> bool:
        """Whether all classes seen are new."""
        return self.new == self.seen

    def learn(self, data: TrainingData, *, seed: int, progress: Progress | None = None) -> list[float]:
        """Train in the base session, then make the new classes' prototypes; returns each pass's mean loss."""
        self._refuse_bad(data)
        losses = self._train(data, seed, progress) if self.in_base_session else []
        self._update_prototypes(data)
        return losses

    def _train(self, data: TrainingData, seed: int, progress: Progress | None) -> list[float]:
        """Cross entropy of a cosine softmax that starts at the class means."""
        classes = torch.tensor(self.new)
        features = self.features(data.images)
        made = prototypes(features, data.labels, data.is_generated, self.n_classes, self.generated_weight)
        head = CosineHead(made[classes], self.temperature).to(self.device)
        columns = torch.searchsorted(classes, data.labels)
        return fit(self.backbone, head, data.images, columns, balanced(columns), self.base, seed, progress)

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**super()._tensors(), **weights_of("backbone", self.backbone)}

    def _take(self, tensors: dict[str, torch.Tensor]) -> None:
        super()._take(tensors)
        take_weights("backbone", self.backbone, tensors)
