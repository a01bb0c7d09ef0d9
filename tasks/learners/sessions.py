"""What all learners share: sessions, features, checkpoints.

A checkpoint is ``learner.json`` and ``weights.safetensors``; both are the same bytes for the same state.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tasks.classification.backbone import Backbone, CheckpointError
from tasks.learners.base import Memory, Progress, TrainingData
from tasks.records import Frozen

CHECKPOINT_FORMAT = 1
FEATURE_BATCH = 256


class _State(Frozen):
    """What stands in ``learner.json``."""

    format: int
    kind: str
    n_classes: int
    known: tuple[int, ...]
    new: tuple[int, ...]
    seen: tuple[int, ...]


class SessionLearner(ABC):
    """A learner on a pre-trained backbone. Subclasses say how it learns and predicts and what else it stores."""

    kind: ClassVar[str]
    memory: ClassVar[Memory]

    def __init__(self, backbone: Backbone, n_classes: int, device: torch.device) -> None:
        """Start without any class known; ``backbone`` is moved to ``device`` and belongs to the learner."""
        self.backbone = backbone.to(device)
        self.device = device
        self.n_classes = n_classes
        self.known: set[int] = set()
        self.new: tuple[int, ...] = ()
        self.seen: tuple[int, ...] = ()

    # ------------------------------------------------------------------------------ learning

    def begin_session(self, new_classes: Sequence[int], seen_classes: Sequence[int]) -> None:
        """See :meth:`Learner.begin_session`."""
        new, seen = tuple(sorted(new_classes)), tuple(sorted(seen_classes))
        if outside := [c for c in seen if not 0 <= c < self.n_classes]:
            raise ValueError(f"class {outside[0]} is out of range: the learner has {self.n_classes} classes")
        if strangers := sorted(set(new) - set(seen)):
            raise ValueError(f"class {strangers[0]} is new but not among the classes seen, {list(seen)}")
        self.new, self.seen = new, seen

    @abstractmethod
    def learn(self, data: TrainingData, *, seed: int, progress: Progress | None = None) -> list[float]:
        """See :meth:`Learner.learn`."""

    def _refuse_bad(self, data: TrainingData) -> None:
        if not self.seen:
            raise ValueError("no session has begun; call begin_session before learn")
        present = set(data.labels.tolist())
        if unseen := sorted(present - set(self.seen)):
            raise ValueError(f"label {unseen[0]} is not among the classes seen, {list(self.seen)}")
        if absent := sorted(set(self.new) - present):
            raise ValueError(f"class {absent[0]} is new but has no picture to learn from")

    # ------------------------------------------------------------------------------ predicting

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """See :meth:`Learner.features`."""
        if len(images) == 0:
            return torch.zeros(0, self.backbone.width)
        self.backbone.eval()
        return torch.cat(
            [self.backbone(x.to(self.device)).float().cpu() for x in images.split(FEATURE_BATCH)]
        )

    @abstractmethod
    def predict(self, images: Tensor, seen: Sequence[int]) -> Tensor:
        """See :meth:`Learner.predict`."""

    @abstractmethod
    def predict_shots(self, data: TrainingData, seen: Sequence[int]) -> Tensor:
        """See :meth:`Learner.predict_shots`."""

    def _refuse_unknown(self, seen: Sequence[int]) -> None:
        if unknown := sorted(set(seen) - self.known):
            raise ValueError(f"class {unknown[0]} has not been learned yet; learn its session first")

    # ------------------------------------------------------------------------------ checkpoints

    def save(self, folder: Path) -> None:
        """See :meth:`Learner.save`; the folder is made if need be."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        refuse_not_finite(tensors)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "weights.safetensors")
        text = json.dumps(self._state().model_dump(), indent=1, sort_keys=True)
        (folder / "learner.json").write_text(text + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """See :meth:`Learner.load`."""
        state = self._read_state(folder / "learner.json")
        path = folder / "weights.safetensors"
        try:
            self._take(load_file(path))
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"the weights in {path} cannot be read or do not fit: {error}") from error
        self.known, self.new, self.seen = set(state.known), state.new, state.seen

    def _state(self) -> _State:
        return _State(
            format=CHECKPOINT_FORMAT,
            kind=self.kind,
            n_classes=self.n_classes,
            known=tuple(sorted(self.known)),
            new=self.new,
            seen=self.seen,
        )

    def _read_state(self, path: Path) -> _State:
        if not path.is_file():
            raise CheckpointError(f"no such checkpoint: {path} is missing")
        try:
            state = _State.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error
        mine = self._state()
        for field in ("format", "kind", "n_classes"):
            if (said := getattr(state, field)) != getattr(mine, field):
                raise CheckpointError(
                    f"the checkpoint {path.parent} was written with {field}={said!r}, but this "
                    f"learner has {field}={getattr(mine, field)!r}; use the settings it was written with"
                )
        return state

    @abstractmethod
    def _tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds, by name."""

    @abstractmethod
    def _take(self, tensors: dict[str, Tensor]) -> None:
        """Take over what ``_tensors`` gave; RuntimeError or KeyError if it does not fit."""


def refuse_not_finite(tensors: dict[str, Tensor]) -> None:
    """Refuse weights that training has driven out of the numbers; a loss is taken before the step that does it.

    Raises:
        ValueError: Names the first tensor that holds NaN or infinity.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"training diverged: {name} is no longer finite; lower the learning_rate of learner.base or "
                f"learner.incremental, whichever trained"
            )


def of_shape(tensors: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The tensor ``name``; KeyError if it is missing, RuntimeError if its shape is not that of ``like``."""
    if tensors[name].shape != like.shape:
        raise RuntimeError(f"{name} has the shape {list(tensors[name].shape)}, not {list(like.shape)}")
    return tensors[name]


def weights_of(name: str, module: nn.Module) -> dict[str, Tensor]:
    """The weights of ``module``, each key prefixed by ``name`` and a dot."""
    return {f"{name}.{key}": value for key, value in module.state_dict().items()}


def take_weights(name: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load what ``weights_of(name, module)`` gave; RuntimeError if it does not fit."""
    prefix = f"{name}."
    module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Modules built inside draw their initial weights from ``seed``; the caller's generator stays put."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
