"""Pictures and settings that tests of learners share."""

from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter

from tasks.classification.backbone import BackboneSettings
from tasks.classification.training import RecipeSettings
from tasks.learners.base import TrainingData
from tasks.learners.factory import LearnerSettings
from tests.tiny_vit import bars, training

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "learner"
FEW = {"passes": 1, "episodes": 2, "steps": 3, "batch": 8}


def recommended(kind: str, backbone: BackboneSettings) -> LearnerSettings:
    """The settings that we recommend, with short trainings; what is not trained at all stays so."""
    values = yaml.safe_load((CONFIGS / f"{kind}.yaml").read_text(encoding="utf-8"))
    values["backbone"] = backbone
    return TypeAdapter(LearnerSettings).validate_python(_shortened(values))


def _shortened(values: dict[str, Any]) -> dict[str, Any]:
    short = {key: _shortened(value) if isinstance(value, dict) else value for key, value in values.items()}
    return short | {key: min(few, short[key]) for key, few in FEW.items() if key in short}


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
