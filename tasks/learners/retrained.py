"""Learners whose head is trained, not made of means: how a session proceeds and how a shot is left out.

The base session continues from epoch to epoch. A later session's epochs each train from where the session
began, on that epoch's pictures, so that a shot can be left out exactly: a trained head has no prototype to
remove a shot from, and the parts that are trained are trained again without it, from where the session
began: once for each place j, without the j-th original of every class. In the base session, which has
held-out pictures, nothing is left out. A class of which nothing is left counts as least similar: such a shot
is always an error.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tasks.classification.backbone import Backbone
from tasks.classification.prototypes import only_seen
from tasks.learners.base import Progress, TrainingData
from tasks.learners.nc_fscil import places
from tasks.learners.sessions import FEATURE_BATCH, SessionLearner, take_weights, weights_of
from tasks.seeding import seed_for


class RetrainedLearner(SessionLearner):
    """Subclasses say what is learned (``learned``), how a session's pictures are, and what the logits are."""

    def __init__(self, backbone: Backbone, n_classes: int, device: torch.device) -> None:
        """See :class:`SessionLearner`; subclasses call ``_holds`` once they have built what they learn."""
        super().__init__(backbone, n_classes, device)
        self.learned: nn.Module = nn.Module()
        self.start: dict[str, Tensor] = {}

    def _holds(self, learned: nn.Module) -> None:
        """Take ``learned``, the parts whose weights change after the base session, to the device."""
        self.learned = learned.to(self.device)
        self.start = self._copied()

    @property
    def in_base_session(self) -> bool:
        """Whether all classes seen are new."""
        return self.new == self.seen

    def learn(self, data: TrainingData, *, seed: int, progress: Progress | None = None) -> list[float]:
        """Train on one epoch's pictures; returns each pass's mean loss."""
        self._refuse_bad(data)
        fresh = not set(self.new) <= self.known
        if fresh:
            self._open(data, seed)
            self.start = self._copied()
        elif not self.in_base_session:
            self.learned.load_state_dict(self.start)
        losses = self._train(data, seed, progress)
        self.known |= set(self.new)
        return losses

    @abstractmethod
    def _open(self, data: TrainingData, seed: int) -> None:
        """What is done once, before a session's first training."""

    @abstractmethod
    def _train(self, data: TrainingData, seed: int, progress: Progress | None) -> list[float]:
        """Train ``learned`` in place."""

    @abstractmethod
    def _logits(self, images: Tensor) -> Tensor:
        """Logits [n, n_classes] of a batch on the device."""

    def _copied(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.learned.state_dict().items()}

    # ------------------------------------------------------------------------------ predicting

    @torch.no_grad()
    def _all_logits(self, images: Tensor) -> Tensor:
        self.backbone.eval()
        parts = [self._logits(part.to(self.device)).float().cpu() for part in images.split(FEATURE_BATCH)]
        return torch.cat(parts) if len(images) else torch.zeros(0, self.n_classes)

    def predict(self, images: Tensor, seen: Sequence[int]) -> Tensor:
        """See :meth:`Learner.predict`."""
        self._refuse_unknown(seen)
        return only_seen(self._all_logits(images), tuple(seen))

    def predict_shots(self, data: TrainingData, seen: Sequence[int]) -> Tensor:
        """See :meth:`Learner.predict_shots`; the rule stands in the module."""
        self._refuse_unknown(seen)
        real = ~data.is_generated
        logits = torch.zeros(len(data), self.n_classes)
        logits[real] = self._all_logits(data.images[real])
        if not self.in_base_session:
            place, trained = torch.where(real, places(data.labels, real), -1), self._copied()
            for out in range(int(place.max()) + 1):
                self._predict_without(place == out, data, logits, tuple(seen), seed_for("left out", out))
            self.learned.load_state_dict(trained)
        return only_seen(logits[real], tuple(seen))

    def _predict_without(
        self, out: Tensor, data: TrainingData, logits: Tensor, seen: tuple[int, ...], seed: int
    ) -> None:
        """Put into ``logits`` what is said of the pictures ``out`` [n] by weights trained without them."""
        rest = data.of(~out)
        alone = out & ~torch.isin(data.labels, rest.labels)
        self.learned.load_state_dict(self.start)
        if len(rest):
            self._open_again(rest)
            self._train(rest, seed, None)
        logits[out] = self._all_logits(data.images[out])
        least = logits[alone][:, list(seen)].min(1).values if alone.any() else logits.new_zeros(0)
        logits[alone, data.labels[alone]] = least - 1

    def _open_again(self, data: TrainingData) -> None:
        """What of ``_open`` came from pictures, made anew of other ones; here, nothing did."""

    # ------------------------------------------------------------------------------ checkpoints

    def _tensors(self) -> dict[str, Tensor]:
        return {
            **weights_of("learned", self.learned),
            **{f"start.{name}": value for name, value in self.start.items()},
        }

    def _take(self, tensors: dict[str, Tensor]) -> None:
        take_weights("start", self.learned, tensors)
        self.start = self._copied()
        take_weights("learned", self.learned, tensors)
