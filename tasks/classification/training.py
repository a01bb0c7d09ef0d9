"""Fine-tune backbone and head by cross entropy: Adam 2e-4, cosine annealing (paper, Experiment Settings).

The learning rate is a pure function of progress through this call, so each epoch of the paper's loop, which
brings new generated pictures, is one cosine from the full rate to zero. Nothing here draws from global
state: order and augmentation come from ``seed``, and the backbone stays in evaluation mode, so that dropout
and stochastic depth, which have no generator of their own, are off. What is drawn is drawn on the CPU; pictures
are turned and recoloured where the network is.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, normalize

from tasks.images import as_unit, to_greyscale
from tasks.records import Frozen
from tasks.seeding import torch_generator

Progress = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""


class TrainingSettings(Frozen):
    """How long, how fast and on what variations.

    Attributes:
        passes: Over the data in one call; 0 trains nothing.
        batch: Pictures a step.
        learning_rate: Adam's, at progress 0.
        freeze: ``backbone`` trains the head's rows alone.
        rotate: Largest random rotation in degrees, either way.
        scale: Largest random change of scale, as a share: 0.1 is 0.9 to 1.1.
        shift: Largest random shift, as a share of the side, either way.
        grey: Probability of losing colour.
        invert: Probability of turning into the negative. Generated pictures differ from real ones in colours
            first of all; where only some classes have generated ones, colour alone would tell classes apart.
    """

    passes: int = Field(ge=0)
    batch: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    freeze: Literal["none", "backbone"]
    rotate: float = Field(ge=0, le=180)
    scale: float = Field(ge=0, lt=1)
    shift: float = Field(ge=0, lt=1)
    grey: float = Field(ge=0, le=1)
    invert: float = Field(ge=0, le=1)


class RecipeSettings(TrainingSettings):
    """The same for learners whose papers use other optimizers or rates.

    Attributes:
        optimizer: ``sgd`` is Nesterov's, unless ``momentum`` is 0.
        momentum: Of SGD.
        weight_decay: Added to the gradient.
        backbone_rate: Learning rate of the backbone as a share of ``learning_rate``, which is the head's.
    """

    optimizer: Literal["adam", "sgd"]
    momentum: float = Field(ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    backbone_rate: float = Field(gt=0, le=1)


PictureLoss = Callable[[Tensor, Tensor], Tensor]
"""Loss [n] of each picture, of the head's outputs [n, k] and labels [n]."""


def each_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy [n] of logits [n, k] and labels [n]."""
    return cross_entropy(outputs, labels, reduction="none")


class CosineHead(nn.Module):
    """Logits = temperature * cosine of features [n, d] and rows [k, d]."""

    def __init__(self, rows: Tensor, temperature: float) -> None:
        """Start at ``rows`` [k, d], copied."""
        super().__init__()
        self.rows = nn.Parameter(rows.detach().clone())
        self.temperature = temperature

    def forward(self, features: Tensor) -> Tensor:
        """[n, d] to [n, k]."""
        return self.temperature * normalize(features, dim=1) @ normalize(self.rows, dim=1).T


def cosine_rate(progress: float) -> float:
    """Cosine annealing: share of the learning rate at ``progress`` in [0, 1]; 1 at 0, 1/2 halfway, 0 at 1.

    Raises:
        ValueError: ``progress`` lies outside.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress lies in [0, 1], got {progress}")
    return (1 + math.cos(math.pi * progress)) / 2


def fit(
    backbone: nn.Module,
    head: nn.Module,
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
    settings: TrainingSettings,
    seed: int,
    progress: Progress | None = None,
    loss: PictureLoss = each_cross_entropy,
) -> list[float]:
    """Train in place.

    Args:
        backbone: [n, 3, s, s] in [0, 1] to [n, d].
        head: [n, d] to [n, k].
        images: [n, 3, s, s], 8-bit or in [0, 1], on the CPU.
        labels: int64 [n] in [0, k).
        weights: [n], of each picture in the loss; positive.
        settings: See there.
        seed: Of order and augmentation.
        progress: Told after each step.
        loss: Of each picture.

    Returns:
        Mean weighted loss of each pass.

    Raises:
        ValueError: No pictures, or the loss is no longer finite.
    """
    if len(images) == 0:
        raise ValueError("there is nothing to train on: the set of pictures is empty")
    device = next(head.parameters()).device
    optimizer = _optimizer(backbone, head, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = settings.passes * math.ceil(len(images) / settings.batch)
    losses: list[float] = []
    done = 0
    for a_pass in range(settings.passes):
        generator = torch_generator(seed, a_pass)
        total = torch.zeros((), device=device)
        for chosen in _batches(len(images), settings.batch, generator):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * cosine_rate(done / steps)
            batch = as_unit(images[chosen].to(device, non_blocking=True))
            batch = vary(recolour(batch, settings, generator), settings, generator)
            each = loss(head(backbone(batch)), labels[chosen].to(device))
            summed = (each * weights[chosen].to(device)).sum()
            optimizer.zero_grad(set_to_none=True)
            (summed / weights[chosen].sum().to(device)).backward()
            optimizer.step()
            total += summed.detach()
            done += 1
            if progress is not None:
                progress(done, steps)
        losses.append(_finite(float(total) / float(weights.sum()), a_pass))
    backbone.requires_grad_(True)
    return losses


def vary(images: Tensor, settings: TrainingSettings, generator: torch.Generator) -> Tensor:
    """Rotate, scale and shift each of [n, 3, s, s] at random; the border's colour fills what comes in."""
    if settings.rotate == settings.scale == settings.shift == 0:
        return images
    draw = (torch.rand(4, len(images), generator=generator) * 2 - 1).to(images.device)
    angle = draw[0] * math.radians(settings.rotate)
    zoom = 1 / (1 + draw[1] * settings.scale)
    shift = draw[2:] * settings.shift * 2  # affine_grid's side is 2 long
    rows = torch.stack(
        [angle.cos() * zoom, -angle.sin() * zoom, shift[0], angle.sin() * zoom, angle.cos() * zoom, shift[1]],
        1,
    )
    grid = affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def recolour(images: Tensor, settings: TrainingSettings, generator: torch.Generator) -> Tensor:
    """Turn each of [n, 3, s, s] in [0, 1] to grey, to its negative, to both or to neither, at random."""
    if settings.grey == settings.invert == 0:
        return images
    draw = torch.rand(2, len(images), 1, 1, 1, generator=generator).to(images.device)
    grey = torch.where(draw[0] < settings.grey, to_greyscale(images).expand_as(images), images)
    return torch.where(draw[1] < settings.invert, 1 - grey, grey)


def _optimizer(backbone: nn.Module, head: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    backbone.eval()
    backbone.requires_grad_(settings.freeze == "none")
    inner, outer = ([p for p in part.parameters() if p.requires_grad] for part in (backbone, head))
    if not isinstance(settings, RecipeSettings):
        return torch.optim.Adam([*inner, *outer], lr=settings.learning_rate, fused=_fused(outer))
    slow = settings.learning_rate * settings.backbone_rate
    groups = [{"params": inner, "lr": slow}, {"params": outer, "lr": settings.learning_rate}]
    return make_optimizer(groups, settings.optimizer, settings.momentum, settings.weight_decay)


def make_optimizer(
    groups: list[dict[str, Any]], kind: Literal["adam", "sgd"], momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Adam, or SGD with Nesterov momentum, over groups that name ``params`` and ``lr``; empty ones are left out."""
    present = [group for group in groups if group["params"]]
    fused = _fused(present[0]["params"]) if present else None
    if kind == "adam":
        return torch.optim.Adam(present, weight_decay=weight_decay, fused=fused)
    nesterov = momentum > 0
    return torch.optim.SGD(
        present, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, fused=fused
    )


def _fused(parameters: list[nn.Parameter]) -> bool | None:
    """Whether one kernel updates all weights: on a GPU; None leaves the choice to torch."""
    return True if parameters and parameters[0].is_cuda else None


def _batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    return iter(torch.randperm(n, generator=generator).split(size))


def _finite(loss: float, a_pass: int) -> float:
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} after pass {a_pass}; lower learner's learning_rate")
    return loss
