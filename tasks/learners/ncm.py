"""Nearest class mean on the frozen pre-trained backbone: no weight is ever trained.

Thomas Mensink, Jakob Verbeek, Florent Perronnin, Gabriela Csurka, "Distance-Based Image Classification:
Generalizing to New Classes at Near-Zero Cost", TPAMI 2013. A class is the mean of its features, so a new
class costs a mean and changes nothing else. Deviations: no metric is learned, and features are compared by
the cosine.

Not in the paper's tables, and the first thing that any of their rows should beat. Generated pictures count
through ``generated_weight``; those of earlier classes change nothing: their prototypes are never out of date.

Trains: nothing.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from tasks.classification.backbone import BackboneSettings, load_backbone
from tasks.learners.base import Progress, TrainingData
from tasks.learners.prototype import PrototypeLearner
from tasks.records import Frozen


class NcmSettings(Frozen):
    """The frozen backbone and how its class means are made.

    Attributes:
        kind: Chooses this learner.
        backbone: Pre-trained weights.
        temperature: Factor of the cosine in logits; changes margins, not predictions.
        generated_weight: Share of the generated pictures in a prototype, in [0, 1].
    """

    kind: Literal["ncm"]
    backbone: BackboneSettings
    temperature: float = Field(gt=0)
    generated_weight: float = Field(ge=0, le=1)


class Ncm(PrototypeLearner):
    """Class means of frozen features."""

    kind: ClassVar[str] = "ncm"

    def __init__(self, settings: NcmSettings, n_classes: int, device: torch.device) -> None:
        """Load the backbone.

        Raises:
            CheckpointError: There are no such weights.
        """
        backbone = load_backbone(settings.backbone)
        super().__init__(backbone, n_classes, settings.generated_weight, settings.temperature, device)

    def learn(self, data: TrainingData, *, seed: int, progress: Progress | None = None) -> list[float]:
        """Make the new classes' prototypes; returns no losses."""
        self._refuse_bad(data)
        self._update_prototypes(data)
        return []
