"""The pre-trained network whose features the prototype head psi compares (paper: ViT-B/16; any of timm's).

Three sources of weights, never random ones; of all only safetensors are read, of any precision:

    checkpoint: null                timm's published weights of ``name`` (pinned tag; fetched once)
    checkpoint: <file>.safetensors  weights of the timm model ``name``, with or without classification head
    checkpoint: <folder>            config.json and model.safetensors: a published timm model's own folder, or a
                                    ViT of this project's own

A ViT's ``config.json`` holds ``architecture`` (timm's VisionTransformer, by any path to it), ``arguments`` of that
class with ``img_size`` among them, ``mean`` and ``std``; a published model's holds ``architecture`` (timm's name) and
``pretrained_cfg``. Input size, mean and standard deviation are the weights' own unless settings say otherwise.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import timm
import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models import PretrainedCfg
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tasks.hub import hub_file
from tasks.images import as_unit
from tasks.records import Digest, Frozen
from tasks.settings import added_later
from tasks.store import digest_of

ARCHITECTURE = "VisionTransformer"
WEIGHTS = "model.safetensors"


class CheckpointError(ValueError):
    """Weights that are missing or of another shape; the message names the path and the remedy."""


class BackboneSettings(Frozen):
    """Which pre-trained network, and how it computes.

    Attributes:
        name: timm model with its pinned tag, as ``vit_base_patch16_224.augreg_in21k``; of a folder checkpoint
            only a label.
        checkpoint: None, a ``.safetensors`` file, or a folder (see the module).
        size: Side in pixels that the network takes; pictures of another size are resampled. None takes the
            weights' own; another one interpolates a ViT's position embedding.
        mean: Of each channel, subtracted from [0, 1]; None takes the weights' own.
        std: Of each channel, by which is then divided; None takes the weights' own.
        precision: ``bfloat16`` lets the network compute in it where that is safe (autocast); its weights,
            features and gradients stay float32.
        checkpointing: Activations are computed again in the backward pass instead of kept: a third more time,
            a fraction of the memory, the same result.
    """

    name: str
    checkpoint: str | None
    size: int | None = Field(ge=1)
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    precision: Literal["float32", "bfloat16"] = added_later("float32")
    checkpointing: bool = added_later(False)


class Backbone(nn.Module):
    """Pictures [n, 3, h, w] in [0, 1] to features [n, width]: resample, normalise, network without head."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        """Wrap ``network``, timm's, which takes normalised [n, 3, size, size]."""
        super().__init__()
        self.network = network
        self.size = size
        self.precision = precision
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @property
    def width(self) -> int:
        """Length of a feature vector."""
        return cast(int, getattr(self.network, "head_hidden_size", self.network.num_features))

    def forward(self, images: Tensor) -> Tensor:
        """[n, 3, h, w], 8-bit or in [0, 1], to [n, width], not normalised."""
        prepared = self.prepare(images)
        with self.computing(images.device):
            return cast(Tensor, self.network(prepared)).float()

    def prepare(self, images: Tensor) -> Tensor:
        """[n, 3, h, w], 8-bit or in [0, 1], to what the network takes: [n, 3, size, size], normalised."""
        images = as_unit(images)
        if images.shape[-2:] != (self.size, self.size):
            images = nn.functional.interpolate(
                images, (self.size, self.size), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        return (images - self.mean) / self.std

    def computing(self, device: torch.device) -> AbstractContextManager[object]:
        """In which the network computes with the precision it was given."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16)


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
        raise _nowhere(path)
    if settings.checkpointing:
        cast(Any, backbone.network).set_grad_checkpointing(True)
    return backbone.eval()


def pretrained_digest(settings: BackboneSettings) -> Digest:
    """The content id of the weights: of the checkpoint's file or folder, or of the published file.

    Raises:
        CheckpointError: There are none.
    """
    if settings.checkpoint is None:
        return digest_of(_published_file(settings.name))
    if not Path(settings.checkpoint).exists():
        raise _nowhere(Path(settings.checkpoint))
    return digest_of(Path(settings.checkpoint))


# ---------------------------------------------------------------------------------------- sources


def _published(settings: BackboneSettings) -> Backbone:
    return _timm_backbone(settings, settings.name, None, _published_file(settings.name))


def _published_file(name: str) -> Path:
    known = _description(name)
    if known is None or not known.hf_hub_id:
        raise CheckpointError(
            f"no weights are published under the name {name!r}; add a tag to classifier.name, "
            f"or name a file with classifier.checkpoint="
        )
    remedy = "run once where there is a network, or name a file of these weights with classifier.checkpoint="
    try:
        return hub_file(known.hf_hub_id, WEIGHTS, None, remedy)
    except ValueError as error:
        raise CheckpointError(f"no such checkpoint: {error}") from error


def _from_file(settings: BackboneSettings, path: Path) -> Backbone:
    _description(settings.name)
    return _timm_backbone(settings, settings.name, None, path)


def _nowhere(path: Path) -> CheckpointError:
    return CheckpointError(
        f"no such checkpoint: {path}; name a folder, a .safetensors file, or null for timm's own weights "
        f"with classifier.checkpoint="
    )


def _description(name: str) -> PretrainedCfg | None:
    """What timm knows of published weights; None of a model that has none."""
    if not timm.is_model(name.split(".")[0]):
        raise CheckpointError(f"timm has no model {name!r}; choose another classifier.name")
    try:
        return cast(PretrainedCfg | None, timm.get_pretrained_cfg(name))
    except RuntimeError as error:
        raise CheckpointError(f"{error} Choose another tag in classifier.name={name!r}") from error


def _timm_backbone(
    settings: BackboneSettings, name: str, config: Mapping[str, Any] | None, weights: Path
) -> Backbone:
    """Timm's model ``name`` with weights of a file; ``config`` stands for timm's own description of them."""
    with _own_randomness():
        network: Any = timm.create_model(name, pretrained_cfg=dict(config) if config else None, num_classes=0)
    known = resolve_model_data_config(network)
    _load_weights(network, weights, network.pretrained_cfg.get("classifier") or "head")
    own = known["input_size"][-1]
    size = settings.size or own
    if size != own and hasattr(network, "set_input_size"):
        network.set_input_size(img_size=size)
    return _normalised(settings, network, size, known["mean"], known["std"])


def _normalised(
    settings: BackboneSettings, network: nn.Module, size: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> Backbone:
    return Backbone(network, size, settings.mean or mean, settings.std or std, settings.precision)


class _Description(BaseModel):
    """A folder's ``config.json``: either timm's own, or the architecture with its arguments and statistics."""

    architecture: str
    pretrained_cfg: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


def _from_folder(settings: BackboneSettings, folder: Path) -> Backbone:
    file = folder / "config.json"
    told = _read_description(file)
    if told.pretrained_cfg is not None:
        _description(told.architecture)
        with _described_by(file):
            return _timm_backbone(settings, told.architecture, told.pretrained_cfg, folder / WEIGHTS)
    if told.architecture.rpartition(".")[2] != ARCHITECTURE:
        raise CheckpointError(
            f"{file} has the architecture {told.architecture!r}; only timm's {ARCHITECTURE} is read"
        )
    if told.arguments is None or told.mean is None or told.std is None:
        missing = next(name for name in ("arguments", "mean", "std") if getattr(told, name) is None)
        raise CheckpointError(f"{file} lacks {missing!r}")
    side = told.arguments.get("img_size", 224)
    if side != (settings.size or side):
        raise CheckpointError(
            f"the checkpoint {folder} takes pictures of side {side}, but classifier.size={settings.size}; "
            f"set it to {side}"
        )
    with _own_randomness(), _described_by(file):
        network = VisionTransformer(**{**told.arguments, "num_classes": 0})
        _load_weights(network, folder / WEIGHTS, "head")
        return _normalised(settings, network, side, told.mean, told.std)


def _read_description(file: Path) -> _Description:
    if not file.is_file():
        raise CheckpointError(f"no such checkpoint: {file} is missing")
    try:
        return _Description.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise CheckpointError(f"{file} is not the description of a classifier: {error}") from error


@contextmanager
def _described_by(file: Path) -> Iterator[None]:
    """What timm says of a description that makes no network is a complaint about that file."""
    try:
        yield
    except CheckpointError:
        raise
    except (
        ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{file} is not the description of a classifier: {type(error).__name__}: {error}"
        ) from error


def _load_weights(network: nn.Module, path: Path, head: str) -> None:
    """Load all weights but those of the classification head, whose names begin with ``head``."""
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path} is missing")
    try:
        weights = {k: v for k, v in load_file(path).items() if not k.startswith(f"{head}.")}
        network.load_state_dict(weights, strict=True)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"the weights in {path} do not fit the network: {error}") from error


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Building a network draws initial weights, which are then replaced: the caller's generator stays put."""
    with torch.random.fork_rng(devices=[]):
        yield
