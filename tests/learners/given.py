"""Pictures and a recipe that tests of learners share."""

import torch

from tasks.classification.training import RecipeSettings
from tasks.learners.base import TrainingData
from tests.tiny_vit import bars, training


def pictures(per_class: int, classes: tuple[int, ...], seed: int, generated: bool = False) -> TrainingData:
    """``per_class`` pictures of each of ``classes``, of five."""
    images, labels = bars(per_class, 5, seed)
    keep = torch.isin(labels, torch.tensor(classes))
    return TrainingData(images[keep], labels[keep], torch.full((int(keep.sum()),), generated))


def base_data(per_class: int = 8) -> TrainingData:
    """Originals of the classes 0, 1 and 2."""
    return pictures(per_class, (0, 1, 2), seed=1)


def session_data(per_class: int = 3) -> TrainingData:
    """Originals of the classes 3 and 4."""
    return pictures(per_class, (3, 4), seed=2)


def recipe(**changes: object) -> RecipeSettings:
    """A few quick steps of Adam."""
    own = {"optimizer": "adam", "momentum": 0.0, "weight_decay": 0.0, "backbone_rate": 1.0}
    return RecipeSettings.model_validate(training().model_dump() | own | changes)
