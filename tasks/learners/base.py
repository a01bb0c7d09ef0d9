"""What a learner is: it learns a session's pictures, real and generated alike, and keeps none of them.

One call of ``learn`` is one epoch k of the paper's loop: it continues from the current weights with the
set A_k of that epoch. Within a session ``begin_session`` may be called before every epoch; only the first
call of a session changes anything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

Memory = Literal["prototypes", "features", "none"]
"""What a learner keeps of earlier sessions' data: one vector a class, vectors of pictures, or nothing."""

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


@dataclass(frozen=True)
class TrainingData:
    """Pictures to learn from.

    Attributes:
        images: uint8 [n, 3, s, s], or float32 in [0, 1]; 8 bits take a quarter of the memory.
        labels: int64 [n].
        is_generated: bool [n]; False for originals.

    Raises:
        ValueError: Shapes or types differ from these.
    """

    images: Tensor
    labels: Tensor
    is_generated: Tensor

    def __post_init__(self) -> None:
        """Check shapes and types."""
        n = len(self.images)
        pixels = self.images.is_floating_point() or self.images.dtype == torch.uint8
        if self.images.ndim != 4 or self.images.shape[1] != 3 or not pixels:
            raise ValueError(
                f"images must be uint8 or float [n, 3, s, s], got {self.images.dtype} {list(self.images.shape)}"
            )
        if self.labels.shape != (n,) or self.labels.dtype != torch.int64:
            raise ValueError(f"labels must be int64 [{n}], got {self.labels.dtype} {list(self.labels.shape)}")
        if self.is_generated.shape != (n,) or self.is_generated.dtype != torch.bool:
            raise ValueError(
                f"is_generated must be bool [{n}], got "
                f"{self.is_generated.dtype} {list(self.is_generated.shape)}"
            )

    def __len__(self) -> int:
        """How many pictures."""
        return len(self.images)

    def of(self, chosen: Tensor) -> "TrainingData":
        """The pictures at a bool or int index [.]."""
        return TrainingData(self.images[chosen], self.labels[chosen], self.is_generated[chosen])


class Learner(Protocol):
    """A classifier for class-incremental sessions."""

    kind: ClassVar[str]
    memory: ClassVar[Memory]

    def begin_session(self, new_classes: Sequence[int], seen_classes: Sequence[int]) -> None:
        """Say which classes are new and which have been seen, the new ones among them.

        Raises:
            ValueError: A class out of range, or a new one that is not among those seen.
        """
        ...

    def learn(self, data: TrainingData, *, seed: int, progress: Progress | None = None) -> list[float]:
        """Learn one epoch's pictures, from the current weights on.

        Returns:
            The mean loss of each pass over the data; empty for a learner that does not train.

        Raises:
            ValueError: No session begun, a label not seen, or a new class without pictures.
        """
        ...

    def predict(self, images: Tensor, seen: Sequence[int]) -> Tensor:
        """Logits [n, n_classes] of [n, 3, s, s], 8-bit or in [0, 1]; minus infinity where a class is not seen."""
        ...

    def predict_shots(self, data: TrainingData, seen: Sequence[int]) -> Tensor:
        """Logits [m, n_classes] of the m originals in ``data``, in order, each without its own contribution.

        ``data`` is what ``learn`` was last given.
        """
        ...

    def features(self, images: Tensor) -> Tensor:
        """Features [n, d] on the CPU."""
        ...

    def save(self, folder: Path) -> None:
        """Write weights and state into ``folder``; equal states give equal bytes.

        Raises:
            ValueError: Training has left NaN or infinity in the weights.
        """
        ...

    def load(self, folder: Path) -> None:
        """Take over what ``save`` wrote.

        Raises:
            CheckpointError: It is missing, of another learner, or does not fit.
        """
        ...
