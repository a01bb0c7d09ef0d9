r"""NC-FSCIL: a head of fixed class directions, ICLR 2023.

Yibo Yang, Haobo Yuan, Xiangtai Li, Zhouchen Lin, Philip Torr, Dacheng Tao: "Neural Collapse Inspired
Feature-Classifier Alignment for Few-Shot Class-Incremental Learning".

A trained classifier tends to equal angles between all class directions, so these are fixed in advance, for
all classes that will ever come: a simplex equiangular tight frame. Backbone and a small neck are trained
towards it in the base session; later only the neck is, on the new shots' features and one stored mean feature
of each earlier class.

    E    = sqrt(K / (K - 1)) U (I - 1 1^T / K),   U [d, K] with orthonormal columns
    m    = neck(f(x)) / |neck(f(x))|
    loss = scale / 2 (<m, e_y> - 1)^2             logit_c = <m, e_c>

The frame's K is the number of classes of the whole benchmark, which a learner in use would not know:
``etf_classes`` sets more of them aside.

Deviations: one session trains on all of its few features at each step, so that no batch is drawn (the
released code's result hangs on the batch's size), with no mixing of features or pictures and no targets
scaled by class counts; an earlier class's mean counts as ``old_weight`` pictures in place of a list of copies
by session; within a session each epoch of the loop trains the neck from where the session began; the last
weights are kept, where the released code chose the base model by test accuracy. Generated pictures of new
classes join with the share ``generated_weight``; those of earlier classes change nothing. ``as_published``:
the settings for CUB-200.

Left-out shots: the head has no prototype to remove a shot from, so the neck is trained again without it: once
for each place j, without the j-th original of every class, from where the session began. In the base session,
which has held-out pictures, nothing is left out.

Trains: backbone and neck in the base session, the neck later.
"""

import copy
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, normalize

from tasks.classification.backbone import BackboneSettings, load_backbone
from tasks.classification.prototypes import LEAST_SIMILARITY, only_seen
from tasks.classification.training import RecipeSettings, cosine_rate, fit, make_optimizer
from tasks.learners.base import Memory, Progress, TrainingData
from tasks.learners.finetune_proto import balanced
from tasks.learners.sessions import SessionLearner, of_shape, seeded, take_weights, weights_of
from tasks.records import Frozen
from tasks.seeding import seed_for

SLOPE = 0.1


class NeckSettings(Frozen):
    """How the neck is trained in a session after the base session.

    Attributes:
        steps: On all features of the session at once.
        optimizer: As in :class:`RecipeSettings`, like the next two.
        momentum: Of SGD.
        weight_decay: Of the neck.
        learning_rate: At the first step.
        old_weight: How many pictures the mean feature of an earlier class counts as.
    """

    steps: int = Field(ge=0)
    optimizer: Literal["adam", "sgd"]
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    learning_rate: float = Field(gt=0)
    old_weight: float = Field(ge=0)


class NcFscilSettings(Frozen):
    """The frame, the neck and their training.

    Attributes:
        kind: Chooses this learner.
        backbone: Pre-trained weights to start from.
        generated_weight: Share of the generated pictures of a new class, in [0, 1].
        etf_classes: Columns of the frame; None takes the number of classes of all sessions.
        width: Length of the neck's output, at least the number of columns.
        loss_scale: Factor of the loss.
        base: Training of backbone and neck in the base session.
        incremental: Training of the neck in later sessions.
    """

    kind: Literal["nc_fscil"]
    backbone: BackboneSettings
    generated_weight: float = Field(ge=0, le=1)
    etf_classes: int | None = Field(ge=2)
    width: int = Field(ge=2)
    loss_scale: float = Field(gt=0)
    base: RecipeSettings
    incremental: NeckSettings


class Neck(nn.Module):
    """A three-layer perceptron beside a linear path: features [n, d] to [n, width]."""

    def __init__(self, features: int, width: int) -> None:
        """Hidden layers are twice as wide as the features; weights come from torch's generator."""
        super().__init__()
        hidden = 2 * features
        self.first, self.first_norm = nn.Linear(features, hidden), nn.LayerNorm(hidden)
        self.second, self.second_norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.third = nn.Linear(hidden, width, bias=False)
        self.skip = nn.Linear(features, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """[n, d] to [n, width]."""
        inner = leaky_relu(self.first_norm(self.first(features)), SLOPE)
        inner = leaky_relu(self.second_norm(self.second(inner)), SLOPE)
        return self.third(inner) + self.skip(features)  # type: ignore[no-any-return]


class FrameHead(nn.Module):
    """Cosines of the neck's output and the frame's columns: features [n, d] to [n, K]."""

    frame: Tensor

    def __init__(self, neck: Neck, frame: Tensor) -> None:
        """``neck`` is trained, ``frame`` [width, K] is not."""
        super().__init__()
        self.neck = neck
        self.register_buffer("frame", frame)

    def forward(self, features: Tensor) -> Tensor:
        """[n, d] to [n, K], in [-1, 1]."""
        return normalize(self.neck(features), dim=1) @ self.frame


class NcFscil(SessionLearner):
    """A neck that turns features towards a fixed frame of class directions."""

    kind: ClassVar[str] = "nc_fscil"
    memory: ClassVar[Memory] = "features"

    def __init__(self, settings: NcFscilSettings, n_classes: int, device: torch.device) -> None:
        """Load the backbone.

        Raises:
            CheckpointError: There are no such weights.
            ValueError: The frame has less columns than there are classes, or the neck is too narrow for it.
        """
        columns = settings.etf_classes or n_classes
        refuse_frame(columns, n_classes, settings.width)
        super().__init__(load_backbone(settings.backbone), n_classes, device)
        self.settings = settings
        self.means = torch.zeros(n_classes, self.backbone.width)
        self.head = self._new_head(columns, 0)
        self.start = self._new_head(columns, 0)

    def learn(self, data: TrainingData, *, seed: int, progress: Progress | None = None) -> list[float]:
        """Base session: train backbone and neck; later the neck. Returns losses of passes, or the last step's."""
        self._refuse_bad(data)
        fresh = not set(self.new) <= self.known
        if self.new == self.seen:
            if not self.known:
                self.head = self._new_head(self.head.frame.shape[1], seed_for(seed, "neck"))
            losses = self._train_base(data, seed, progress)
            features = self.features(data.images)
        else:
            if fresh:
                self.start.load_state_dict(self.head.state_dict())
            features = self.features(data.images)
            self.head.load_state_dict(self.start.state_dict())
            losses = self._settle(self.head, features, data)
        self._keep_means(features, data)
        return losses

    # ------------------------------------------------------------------------------ steps

    def _new_head(self, columns: int, seed: int) -> FrameHead:
        width = self.settings.width
        with seeded(seed):
            head = FrameHead(Neck(self.backbone.width, width), equiangular_frame(width, columns))
        return head.to(self.device)

    def _train_base(self, data: TrainingData, seed: int, progress: Progress | None) -> list[float]:
        def loss(cosines: Tensor, labels: Tensor) -> Tensor:
            return dot_regression(cosines, labels, self.settings.loss_scale)

        weights = balanced(data.labels)
        return fit(
            self.backbone,
            self.head,
            data.images,
            data.labels,
            weights,
            self.settings.base,
            seed,
            progress,
            loss,
        )

    def _settle(self, head: FrameHead, features: Tensor, data: TrainingData) -> list[float]:
        """Train the neck in ``head`` on the new classes' features [n, d] and the earlier ones' means."""
        how, inputs = self.settings.incremental, self._inputs(features, data)
        features, labels, weights = (part.to(self.device) for part in inputs)
        groups = [{"params": [*head.parameters()], "lr": how.learning_rate}]
        optimizer = make_optimizer(groups, how.optimizer, how.momentum, how.weight_decay)
        loss = torch.zeros(())
        for done in range(how.steps):
            for group in optimizer.param_groups:
                group["lr"] = how.learning_rate * cosine_rate(done / how.steps)
            each = dot_regression(head(features), labels, self.settings.loss_scale)
            loss = (each * weights).sum() / weights.sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return [float(loss.detach())] if how.steps else []

    def _inputs(self, features: Tensor, data: TrainingData) -> tuple[Tensor, Tensor, Tensor]:
        """Features [m, d], labels [m] and weights [m] of new pictures and of earlier classes' means."""
        old = torch.tensor([c for c in self.seen if c not in self.new])
        new = torch.isin(data.labels, torch.tensor(self.new))
        weights = shares(data.labels[new], data.is_generated[new], self.settings.generated_weight)
        means = torch.full((len(old),), self.settings.incremental.old_weight)
        return (
            torch.cat([self.means[old], features[new]]),
            torch.cat([old, data.labels[new]]),
            torch.cat([means, weights]),
        )

    def _keep_means(self, features: Tensor, data: TrainingData) -> None:
        for a_class in self.new:
            mine = data.labels == a_class
            weights = shares(data.labels[mine], data.is_generated[mine], self.settings.generated_weight)
            self.means[a_class] = (features[mine] * weights[:, None]).sum(0) / weights.sum()
        self.known |= set(self.new)

    # ------------------------------------------------------------------------------ predicting

    @torch.no_grad()
    def _cosines(self, head: FrameHead, features: Tensor) -> Tensor:
        return head(features.to(self.device)).cpu()[:, : self.n_classes]

    def predict(self, images: Tensor, seen: Sequence[int]) -> Tensor:
        """See :meth:`Learner.predict`."""
        self._refuse_unknown(seen)
        return only_seen(self._cosines(self.head, self.features(images)), tuple(seen))

    def predict_shots(self, data: TrainingData, seen: Sequence[int]) -> Tensor:
        """See :meth:`Learner.predict_shots`; the rule stands in the module."""
        self._refuse_unknown(seen)
        features, real = self.features(data.images), ~data.is_generated
        logits = self._cosines(self.head, features)
        if self.new != self.seen:
            place = torch.where(real, places(data.labels, real), -1)
            for out in range(int(place.max()) + 1):
                self._predict_without(place == out, features, data, logits)
        return only_seen(logits[real], tuple(seen))

    def _predict_without(self, out: Tensor, features: Tensor, data: TrainingData, logits: Tensor) -> None:
        """Put into ``logits`` what a neck says of the pictures ``out`` [n] that was trained without them."""
        rest = data.of(~out)
        head = copy.deepcopy(self.start)
        self._settle(head, features[~out], rest)
        logits[out] = self._cosines(head, features[out])
        alone = out & ~torch.isin(data.labels, rest.labels)
        logits[alone, data.labels[alone]] = LEAST_SIMILARITY

    # ------------------------------------------------------------------------------ checkpoints

    def _tensors(self) -> dict[str, Tensor]:
        return {
            "features": self.means,
            **weights_of("backbone", self.backbone),
            **weights_of("head", self.head),
            **weights_of("start", self.start),
        }

    def _take(self, tensors: dict[str, Tensor]) -> None:
        self.means = of_shape(tensors, "features", self.means)
        take_weights("backbone", self.backbone, tensors)
        take_weights("head", self.head, tensors)
        take_weights("start", self.start, tensors)


def refuse_frame(columns: int, n_classes: int, width: int) -> None:
    """ValueError if a frame of ``columns`` directions in ``width`` dimensions cannot hold ``n_classes``."""
    if n_classes > columns:
        raise ValueError(
            f"NC-FSCIL's frame has {columns} columns, but the dataset has {n_classes} classes; "
            f"set learner.etf_classes={n_classes} or null"
        )
    if width < columns:
        raise ValueError(
            f"NC-FSCIL's frame of {columns} columns needs a neck at least as wide, not {width}; "
            f"set learner.width={columns}"
        )


def equiangular_frame(width: int, columns: int) -> Tensor:
    """Unit columns [width, columns] with cosines -1 / (columns - 1); drawn from torch's generator."""
    basis = torch.linalg.qr(torch.randn(width, columns, dtype=torch.float64)).Q
    centred = torch.eye(columns, dtype=torch.float64) - 1 / columns
    return ((columns / (columns - 1)) ** 0.5 * basis @ centred).float()


def dot_regression(cosines: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Loss [n] of cosines [n, K] to the frame's columns and labels [n]; zero on a feature's own column."""
    own = cosines.gather(1, labels[:, None]).squeeze(1)
    return scale / 2 * (own - 1) ** 2


def shares(labels: Tensor, is_generated: Tensor, generated_weight: float) -> Tensor:
    """Weights [n]: a class's sum to its number of originals, of which its generated pictures get their share.

    A class with one kind only has weights of 1.
    """
    weights = torch.ones(len(labels))
    for a_class in labels.unique():
        real, generated = (labels == a_class) & ~is_generated, (labels == a_class) & is_generated
        if real.any() and generated.any():
            weights[real] = 1 - generated_weight
            weights[generated] = generated_weight * float(real.sum()) / float(generated.sum())
    return weights


def places(labels: Tensor, counted: Tensor) -> Tensor:
    """How many counted pictures [n] of the same class come before each: 0 for the first."""
    same = (labels[:, None] == labels) & counted
    return same.tril(-1).sum(1)
