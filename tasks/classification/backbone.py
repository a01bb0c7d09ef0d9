"""The pre-trained vision transformer whose features the prototype head psi compares (paper: ViT-B/16).

Three sources of weights, never random ones:

    checkpoint: null                timm's published weights of ``name`` (pinned tag; fetched once)
    checkpoint: <file>.safetensors  weights of the timm model ``name``
    checkpoint: <folder>            config.json and model.safetensors; a ViT of this project's own

``config.json`` holds ``architecture`` (timm's VisionTransformer, by any path to it), ``arguments`` of that
class with ``img_size`` among them, ``mean`` and ``std``.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import timm
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tasks.records import Frozen

ARCHITECTURE = "VisionTransformer"


class CheckpointError(ValueError):
    """Weights that are missing or of another shape; the message names the path and the remedy."""


class BackboneSettings(Frozen):
    """Which pre-trained network.

    Attributes:
        name: timm model with its pinned tag, as ``vit_base_patch16_224.augreg_in21k``; of a folder checkpoint
            only a label.
        checkpoint: None, a ``.safetensors`` file, or a folder (see the module).
        size: Side in pixels that the network takes; pictures of another size are resampled.
        mean: Of each channel, subtracted from [0, 1]; None takes the weights' own.
        std: Of each channel, by which is then divided; None takes the weights' own.
    """

    name: str
    checkpoint: str | None
    size: int = Field(ge=1)
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None


class Backbone(nn.Module):
    """Pictures [n, 3, h, w] in [0, 1] to features [n, width]: resample, normalise, network without head."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, size: int, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        """Wrap ``network``, which takes normalised [n, 3, size, size] and has ``num_features``."""
        super().__init__()
        self.network = network
        self.size = size
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        return cast(int, self.network.num_features)

    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, h, w] in [0, 1] to [n, width], not normalised."""
        if images.shape[-2:] != (self.size, self.size):
            images = nn.functional.interpolate(
                images, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        return cast(Tensor, self.network((images - self.mean) / self.std))


def load_backbone(settings: BackboneSettings) -> Backbone:
    """Load the network in evaluation mode, on the CPU, without its classification head.

    Raises:
        CheckpointError: No such checkpoint or model, another size, or weights that do not fit.
    """
    if settings.checkpoint is None:
        backbone = _published(settings)
    elif (path := Path(settings.checkpoint)).is_dir():
        backbone = _from_folder(settings, path)
    elif path.is_file():
        backbone = _from_file(settings, path)
    else:
        raise CheckpointError(
            f"no such checkpoint: {path}; name a folder, a .safetensors file, or null for timm's own weights "
            f"with classifier.checkpoint="
        )
    return backbone.eval()


# ---------------------------------------------------------------------------------------- sources


def _published(settings: BackboneSettings) -> Backbone:
    _refuse_unknown(settings.name)
    try:
        network = _timm_model(settings, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"no such checkpoint: the weights of {settings.name!r} are neither cached nor can be fetched "
            f"({type(error).__name__}); fetch them once with a network, or name a file with "
            f"classifier.checkpoint="
        ) from error
    return _with_timm_statistics(settings, network)


def _from_file(settings: BackboneSettings, path: Path) -> Backbone:
    _refuse_unknown(settings.name)
    network = _timm_model(settings, pretrained=False)
    _load_weights(network, path)
    return _with_timm_statistics(settings, network)


def _refuse_unknown(name: str) -> None:
    if not timm.is_model(name.split(".")[0]):
        raise CheckpointError(f"timm has no model {name!r}; choose another classifier.name")


def _timm_model(settings: BackboneSettings, pretrained: bool) -> nn.Module:
    with _own_randomness():
        return cast(nn.Module, timm.create_model(settings.name, pretrained=pretrained, num_classes=0))


def _with_timm_statistics(settings: BackboneSettings, network: nn.Module) -> Backbone:
    known = cast(dict[str, tuple[float, ...]], network.pretrained_cfg)
    return Backbone(network, settings.size, settings.mean or known["mean"], settings.std or known["std"])


def _from_folder(settings: BackboneSettings, folder: Path) -> Backbone:
    config = _read_config(folder / "config.json")
    if str(config["architecture"]).rpartition(".")[2] != ARCHITECTURE:
        raise CheckpointError(
            f"{folder / 'config.json'} has the architecture {config['architecture']!r}; "
            f"only timm's {ARCHITECTURE} is read"
        )
    side = config["arguments"].get("img_size", 224)
    if side != settings.size:
        raise CheckpointError(
            f"the checkpoint {folder} takes pictures of side {side}, but classifier.size={settings.size}; "
            f"set it to {side}"
        )
    with _own_randomness():
        network = VisionTransformer(**{**config["arguments"], "num_classes": 0})
    _load_weights(network, folder / "model.safetensors")
    return Backbone(network, settings.size, settings.mean or config["mean"], settings.std or config["std"])


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        missing = {"architecture", "arguments", "mean", "std"} - config.keys()
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is not the description of a classifier: {error}") from error
    if missing:
        raise CheckpointError(f"{path} lacks {sorted(missing)[0]!r}")
    return config


def _load_weights(network: nn.Module, path: Path) -> None:
    """Load all weights but those of a classification head."""
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path} is missing")
    try:
        weights = {k: v for k, v in load_file(path).items() if not k.startswith("head.")}
        network.load_state_dict(weights, strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"the weights in {path} do not fit the network: {error}") from error


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Building a network draws initial weights, which are then replaced: the caller's generator stays put."""
    with torch.random.fork_rng(devices=[]):
        yield
