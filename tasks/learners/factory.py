"""From settings to a learner: the one list of all learners."""

from typing import Annotated

import torch
from pydantic import Field

from tasks.learners.base import Learner
from tasks.learners.finetune_proto import FinetuneProto, FinetuneProtoSettings
from tasks.learners.ncm import Ncm, NcmSettings

LearnerSettings = Annotated[FinetuneProtoSettings | NcmSettings, Field(discriminator="kind")]


def make_learner(settings: LearnerSettings, n_classes: int, device: torch.device) -> Learner:
    """Build the learner that ``settings.kind`` names, with its pre-trained weights.

    Args:
        settings: One of the learners' settings.
        n_classes: Classes of all sessions; columns of its logits.
        device: Where it computes.

    Raises:
        CheckpointError: There are no such weights.
    """
    if isinstance(settings, NcmSettings):
        return Ncm(settings, n_classes, device)
    return FinetuneProto(settings, n_classes, device)
