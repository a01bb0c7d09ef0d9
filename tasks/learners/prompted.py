"""What learners share that tune prompts of a frozen ViT: training, and the two heads, linear and prototype.

Prompts say what they are and how they are chosen (:class:`Prompts`). In both heads a picture's loss is

    cross entropy over the columns that the mask leaves  +  pull * (1 - cosine of the query and the chosen keys)

``mask: session`` leaves the classes of the session's pictures, as published: new rows of a linear head then
never compete with earlier ones, and few-shot sessions end with almost no new class ever predicted. ``mask:
seen`` leaves all.

The linear head keeps nothing of earlier data; ``tasks.learners.retrained`` says how its shots are left out.
The prototype head ("+" in later comparisons) keeps one class mean of the prompted feature; it is trained as
a cosine softmax that starts at the means. Its earlier rows stay where they are, so prompts are best left
alone after the base session (``incremental.passes: 0``).
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from tasks.classification.backbone import Backbone, BackboneSettings
from tasks.classification.prototypes import prototypes
from tasks.classification.training import CosineHead, TrainingSettings, fit
from tasks.learners.base import Memory, Progress, TrainingData
from tasks.learners.finetune_proto import balanced
from tasks.learners.prototype import PrototypeLearner
from tasks.learners.retrained import RetrainedLearner
from tasks.learners.sessions import FEATURE_BATCH, seeded, take_weights, weights_of
from tasks.records import Frozen
from tasks.seeding import seed_for


class PromptTraining(TrainingSettings):
    """As :class:`TrainingSettings`; the backbone is always frozen."""

    freeze: Literal["backbone"]


class PromptedSettings(Frozen):
    """What both methods and both heads read.

    Attributes:
        backbone: Pre-trained ViT, frozen.
        head: ``linear`` is trained, ``prototype`` made of class means.
        mask: Which columns the loss sees: of the ``session``'s pictures, or of all classes ``seen``.
        temperature: Factor of the cosine of the prototype head.
        generated_weight: Share of the generated pictures in a prototype, in [0, 1].
        pull: Weight of the term that draws chosen keys to the query.
        prompt_range: Prompts and keys start uniformly within plus and minus this.
        base: Training of the base session.
        incremental: Training of later sessions.
    """

    backbone: BackboneSettings
    head: Literal["linear", "prototype"]
    mask: Literal["session", "seen"]
    temperature: float = Field(gt=0)
    generated_weight: float = Field(ge=0, le=1)
    pull: float = Field(ge=0)
    prompt_range: float = Field(gt=0)
    base: PromptTraining
    incremental: PromptTraining


class Prompts(nn.Module):
    """Trained prompts with their keys. ``session`` counts the sessions opened, the base session as 0."""

    session: Tensor

    def __init__(self, backbone: Backbone) -> None:
        """No session is open yet; ``backbone`` is read, not held."""
        super().__init__()
        self.width = backbone.width
        self.register_buffer("session", torch.tensor(-1))

    def draw(self, limit: float) -> None:
        """Draw all prompts and keys uniformly within plus and minus ``limit``, from torch's generator."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -limit, limit)

    def open_session(self) -> None:
        """A new session begins."""
        self.session += 1

    def forward(self, backbone: Backbone, images: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Features [n, d] of [n, 3, s, s] in [0, 1], and how far the chosen keys are from the query [n]."""
        raise NotImplementedError


class _Outputs(nn.Module):
    """Pictures to logits [n, k] and, as the last column, the keys' distance."""

    def __init__(self, prompts: Prompts, head: nn.Module, backbone: Backbone, columns: Tensor) -> None:
        super().__init__()
        self.prompts, self.head, self.backbone = prompts, head, backbone
        self.register_buffer("barred", ~columns)

    def forward(self, images: Tensor) -> Tensor:
        features, distance = self.prompts(self.backbone, images, True)
        logits = self.head(features).masked_fill(self.get_buffer("barred"), float("-inf"))
        return torch.cat([logits, distance[:, None]], 1)


def train_prompts(
    prompts: Prompts,
    head: nn.Module,
    backbone: Backbone,
    data: TrainingData,
    seen: tuple[int, ...],
    settings: PromptedSettings,
    how: PromptTraining,
    seed: int,
    progress: Progress | None,
) -> list[float]:
    """Train ``prompts`` and what of ``head`` asks for a gradient, in place; returns each pass's mean loss."""
    n_classes = int(next(head.parameters()).shape[0])
    allowed = torch.tensor(seen) if settings.mask == "seen" else data.labels.unique()
    columns = torch.zeros(n_classes, dtype=torch.bool)
    columns[allowed] = True
    model = _Outputs(prompts, head, backbone, columns).to(next(prompts.parameters()).device)

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(outputs[:, :-1], labels, reduction="none") + settings.pull * outputs[:, -1]

    weights = balanced(data.labels)
    return fit(nn.Identity(), model, data.images, data.labels, weights, how, seed, progress, loss)


@torch.no_grad()
def prompted_features(prompts: Prompts, backbone: Backbone, images: Tensor, device: torch.device) -> Tensor:
    """Features [n, d] on the CPU, as prediction has them."""
    backbone.eval()
    parts = [
        prompts(backbone, part.to(device), False)[0].float().cpu() for part in images.split(FEATURE_BATCH)
    ]
    return torch.cat(parts) if len(images) else torch.zeros(0, backbone.width)


class PromptedLinear(RetrainedLearner):
    """Prompts and a linear head over all classes."""

    memory: ClassVar[Memory] = "none"

    def __init__(
        self,
        settings: PromptedSettings,
        backbone: Backbone,
        prompts: Prompts,
        n_classes: int,
        device: torch.device,
    ) -> None:
        """Prompts and head are drawn when the base session opens."""
        super().__init__(backbone.requires_grad_(False), n_classes, device)
        self.settings, self.prompts = settings, prompts
        self.head = nn.Linear(backbone.width, n_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self._holds(nn.ModuleDict({"prompts": prompts, "head": self.head}))

    def _open(self, data: TrainingData, seed: int) -> None:
        if not self.known:
            with seeded(seed_for(seed, "prompts")):
                self.prompts.cpu().draw(self.settings.prompt_range)
                self.prompts.to(self.device)
        self.prompts.open_session()

    def _train(self, data: TrainingData, seed: int, progress: Progress | None) -> list[float]:
        how = self.settings.base if self.in_base_session else self.settings.incremental
        return train_prompts(
            self.prompts, self.head, self.backbone, data, self.seen, self.settings, how, seed, progress
        )

    def _logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.prompts(self.backbone, images, False)[0])
        return logits

    def features(self, images: Tensor) -> Tensor:
        """See :meth:`Learner.features`: the prompted ones."""
        return prompted_features(self.prompts, self.backbone, images, self.device)


class PromptedPrototypes(PrototypeLearner):
    """Prompts and one mean of the prompted feature a class."""

    def __init__(
        self,
        settings: PromptedSettings,
        backbone: Backbone,
        prompts: Prompts,
        n_classes: int,
        device: torch.device,
    ) -> None:
        """Prompts are drawn when the base session opens."""
        frozen = backbone.requires_grad_(False)
        super().__init__(frozen, n_classes, settings.generated_weight, settings.temperature, device)
        self.settings, self.prompts = settings, prompts.to(device)

    def learn(self, data: TrainingData, *, seed: int, progress: Progress | None = None) -> list[float]:
        """Train the prompts, then make the new classes' means; returns each pass's mean loss."""
        self._refuse_bad(data)
        if not set(self.new) <= self.known:
            if not self.known:
                with seeded(seed_for(seed, "prompts")):
                    self.prompts.cpu().draw(self.settings.prompt_range)
                    self.prompts.to(self.device)
            self.prompts.open_session()
        losses = self._train(data, seed, progress)
        self._update_prototypes(data)
        return losses

    def _train(self, data: TrainingData, seed: int, progress: Progress | None) -> list[float]:
        how = self.settings.base if self.new == self.seen else self.settings.incremental
        if not how.passes:
            return []
        features = self.features(data.images)
        made = prototypes(features, data.labels, data.is_generated, self.n_classes, self.generated_weight)
        rows, new = self.rows.clone(), torch.tensor(self.new)
        rows[new] = made[new]
        head = CosineHead(rows, self.temperature).to(self.device)
        return train_prompts(
            self.prompts, head, self.backbone, data, self.seen, self.settings, how, seed, progress
        )

    def features(self, images: Tensor) -> Tensor:
        """See :meth:`Learner.features`: the prompted ones."""
        return prompted_features(self.prompts, self.backbone, images, self.device)

    def _tensors(self) -> dict[str, Tensor]:
        return {**super()._tensors(), **weights_of("prompts", self.prompts)}

    def _take(self, tensors: dict[str, Tensor]) -> None:
        super()._take(tensors)
        take_weights("prompts", self.prompts, tensors)
