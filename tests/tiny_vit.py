"""A random ViT of a few thousand weights in the folder format of ``tasks.classification.backbone``."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from tasks.classification.backbone import BackboneSettings
from tasks.classification.training import TrainingSettings

ARGUMENTS = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
    "mlp_ratio": 2.0,
}


def save_tiny_vit(folder: Path, depth: int = 2, **changes: object) -> BackboneSettings:
    """Write config.json (with ``changes``) and model.safetensors, and return settings that read them."""
    arguments = ARGUMENTS | {"depth": depth}
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = VisionTransformer(**arguments)
        for (
            parameter
        ) in network.parameters():  # the initial patch projection is near zero: all pictures alike
            torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    config = {
        "architecture": "timm.models.vision_transformer.VisionTransformer",
        "arguments": arguments,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    } | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(network.state_dict(), folder / "model.safetensors")
    return BackboneSettings(name="tiny", checkpoint=str(folder), size=16, mean=None, std=None)


def training(**changes: object) -> TrainingSettings:
    """Settings for a few quick steps."""
    values = {
        "passes": 2,
        "batch": 8,
        "learning_rate": 1e-3,
        "freeze": "none",
        "grey": 0.0,
        "invert": 0.0,
        "rotate": 10.0,
        "scale": 0.1,
        "shift": 0.05,
    } | changes
    return TrainingSettings.model_validate(values)


def bars(per_class: int, n_classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [n, 3, 16, 16] with one bright row whose height tells the class, in some noise; labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_classes).repeat_interleave(per_class)
    images = torch.rand(len(labels), 3, 16, 16, generator=generator) * 0.2
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 3 * label : 3 * label + 3] += 0.8
    return images, labels
