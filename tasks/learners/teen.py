r"""TEEN: "Few-Shot Class-Incremental Learning via Training-Free Prototype Calibration", NeurIPS 2023.

Qi-Wei Wang, Da-Wei Zhou, Yi-Kai Zhang, De-Chuan Zhan, Han-Jia Ye.

A class mean of five shots lies askew, and towards the base classes it resembles: those tell where the whole
class would lie. So each new prototype is moved towards the base prototypes, weighted by how similar they are
to it; nothing is trained after the base session.

    q_b = softmax over base classes b of  tau <p_new, p_b>
    p'  = alpha p_new + (1 - alpha) sum_b q_b p_b        (all unit vectors; compared by the cosine)

Deviations: prototypes are means of normalised features, and the softmax's sharpness tau is a setting beside
the head's temperature; the base session is trained as in :mod:`tasks.learners.ncm_tuned`; generated pictures
count through ``generated_weight``; a left-out shot is compared with the calibrated prototype of the other
shots.

Trains: the backbone in the base session, nothing later.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from tasks.learners.base import Progress, TrainingData
from tasks.learners.ncm_tuned import NcmTuned, TunedSettings
from tasks.learners.sessions import of_shape


class TeenSettings(TunedSettings):
    """How far new prototypes are moved.

    Attributes:
        kind: Chooses this learner.
        own_share: alpha, the share of a new class's own mean in its prototype; 1 moves nothing.
        sharpness: tau of the softmax over base classes.
    """

    kind: Literal["teen"]
    own_share: float = Field(gt=0, le=1)
    sharpness: float = Field(ge=0)


class Teen(NcmTuned):
    """Class means of a frozen backbone, those of new classes calibrated by those of the base classes."""

    kind: ClassVar[str] = "teen"

    def __init__(self, settings: TeenSettings, n_classes: int, device: torch.device) -> None:
        """Load the backbone.

        Raises:
            CheckpointError: There are no such weights.
        """
        super().__init__(settings, n_classes, device)
        self.own_share, self.sharpness = settings.own_share, settings.sharpness
        self.is_base = torch.zeros(n_classes, dtype=torch.bool)

    def learn(self, data: TrainingData, *, seed: int, progress: Progress | None = None) -> list[float]:
        """See :meth:`NcmTuned.learn`; the first session's classes are the base classes."""
        self._refuse_bad(data)
        if self.in_base_session:
            self.is_base[list(self.new)] = True
        return super().learn(data, seed=seed, progress=progress)

    def _placed(self, rows: Tensor, classes: Tensor) -> Tensor:
        moved = calibrated(rows, self.rows[self.is_base], self.own_share, self.sharpness)
        return torch.where(self.is_base[classes][:, None], rows, moved)

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), "is_base": self.is_base}

    def _take(self, tensors: dict[str, Tensor]) -> None:
        super()._take(tensors)
        self.is_base = of_shape(tensors, "is_base", self.is_base)


def calibrated(rows: Tensor, base_rows: Tensor, own_share: float, sharpness: float) -> Tensor:
    """Unit rows [m, d], moved towards the unit rows [b, d] of the base classes that they resemble."""
    share = torch.softmax(sharpness * rows @ base_rows.T, dim=1)
    return normalize(own_share * rows + (1 - own_share) * share @ base_rows, dim=1)
