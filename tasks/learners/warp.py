r"""WaRP: fine-tune later sessions only where the base session does not need the weights, ICLR 2023.

Do-Yeon Kim, Dong-Jun Han, Jun Seo, Jaekyun Moon: "Warping the Space: Weight Space Rotation for
Class-Incremental Few-Shot Learning".

After the base session each chosen layer's weights are written in the basis of its inputs' second moment,
where few coefficients carry what was learned. The most important ones are frozen, the others stay free for
new classes; what a session makes important is frozen for the next.

    X^T X = V L V^T,   C = W V,   W = (C * m + C' * (1 - m)) V^T          m frozen, only C' is trained
    importance_ij = sum over batches |dLoss / dC_ij| = sum |(dLoss / dW) V|_ij
    m <- 1 - (1 - m)(1 - m'),   m' = 1 at the largest ``keep`` of all layers' importances

Deviations: the published code rotates convolutions, and its linear layer drops the bias and is never put in
place; here the linear layers of a ViT's attention and MLP are rotated, in the last ``blocks_share`` of its
blocks, biases and norms frozen. The base session trains a cosine head that starts at the class means
(published: a linear one, then means); basis and importances are of all base pictures; the new classes' means
are made anew with the trained network; the rate is annealed by a cosine. Weight decay reaches free
coefficients only. Each epoch of the loop trains under the mask with which its session began.
``as_published``: its SGD, for ResNets.

Trains: the backbone in the base session, the free coefficients of the rotated layers later.
"""

from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import linear

from tasks.classification.prototypes import cosine_logits
from tasks.classification.tokens import plain_vit
from tasks.classification.training import CosineHead, RecipeSettings, fit
from tasks.learners.base import Progress, TrainingData
from tasks.learners.finetune_proto import balanced
from tasks.learners.ncm_tuned import NcmTuned, TunedSettings
from tasks.learners.sessions import of_shape

LAYERS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


class WarpSettings(TunedSettings):
    """What is rotated and how much of it is kept.

    Attributes:
        kind: Chooses this learner.
        blocks_share: Share of the ViT's blocks whose layers are rotated, the last ones, rounded up.
        layers: Which of their layers.
        keep: Share of coefficients frozen after each session.
        batch: Pictures over which an importance is taken in the base session; later, one.
        incremental: Training of free coefficients in later sessions.
    """

    kind: Literal["warp"]
    blocks_share: float = Field(gt=0, le=1)
    layers: tuple[Literal["qkv", "proj", "fc1", "fc2"], ...] = Field(min_length=1)
    keep: float = Field(ge=0, le=1)
    batch: int = Field(ge=1)
    incremental: RecipeSettings


class RotatedLinear(nn.Module):
    """A linear layer in a rotated basis, of which only the unmasked coefficients are trained."""

    def __init__(self, layer: nn.Linear, basis: Tensor, mask: Tensor) -> None:
        """Args: layer: its weight is [o, d]. basis: [d, d], orthonormal columns. mask: bool [o, d], True is frozen."""
        super().__init__()
        coefficients = layer.weight.detach() @ basis
        self.basis, self.free_places, self.bias = basis, (~mask).to(basis.dtype), layer.bias
        self.frozen = coefficients * mask
        self.free = nn.Parameter(coefficients * self.free_places)

    def weight(self) -> Tensor:
        """[o, d], back in the layer's own basis."""
        return (self.frozen + self.free * self.free_places) @ self.basis.T

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., d] to [..., o]."""
        return linear(inputs, self.weight(), self.bias)


class Warp(NcmTuned):
    """Class means of a backbone of which later sessions move the unimportant coefficients."""

    kind: ClassVar[str] = "warp"

    def __init__(self, settings: WarpSettings, n_classes: int, device: torch.device) -> None:
        """Load the backbone.

        Raises:
            CheckpointError: There are no such weights.
            ValueError: The backbone is no plain ViT.
        """
        super().__init__(settings, n_classes, device)
        self.settings = settings
        blocks = cast(Any, plain_vit(self.backbone, "WaRP").blocks)
        first = len(blocks) - max(1, -int(-len(blocks) * settings.blocks_share // 1))
        self.paths = [
            f"blocks.{block}.{LAYERS[layer]}"
            for block in range(first, len(blocks))
            for layer in settings.layers
        ]
        self.basis: dict[str, Tensor] = {}
        self.mask: dict[str, Tensor] = {}
        self.mask_before: dict[str, Tensor] = {}
        for path in self.paths:
            weight = self._layer(path).weight
            self.basis[path] = torch.eye(weight.shape[1], device=self.device)
            self.mask[path] = torch.zeros_like(weight, dtype=torch.bool)
            self.mask_before[path] = torch.zeros_like(self.mask[path])

    def learn(self, data: TrainingData, *, seed: int, progress: Progress | None = None) -> list[float]:
        """Base session: train all, then rotate; later: train free coefficients. Returns each pass's mean loss."""
        self._refuse_bad(data)
        if not set(self.new) <= self.known:
            self.mask_before = dict(self.mask)
        self._update_prototypes(data)
        if self.in_base_session:
            losses = self._train(data, seed, progress)
            self.basis = second_moment_basis(self._layers(), self.backbone, data.images, self.device)
        else:
            losses = self._train_free(data, seed, progress)
        self._update_prototypes(data)
        self._freeze_more(data)
        return losses

    # ------------------------------------------------------------------------------ steps

    def _layer(self, path: str) -> nn.Linear:
        return cast(nn.Linear, self.backbone.network.get_submodule(path))

    def _layers(self) -> dict[str, nn.Linear]:
        return {path: self._layer(path) for path in self.paths}

    def _train_free(self, data: TrainingData, seed: int, progress: Progress | None) -> list[float]:
        """Cross entropy over the rows of all classes seen, which stay; the layers are folded back at the end."""
        self.backbone.requires_grad_(False)
        layers = self._layers()
        rotated = {p: RotatedLinear(layer, self.basis[p], self.mask_before[p]) for p, layer in layers.items()}
        seen = torch.tensor(self.seen)
        head = CosineHead(self.rows[seen], self.temperature).to(self.device).requires_grad_(False)
        columns = torch.searchsorted(seen, data.labels)
        try:
            for path, layer in rotated.items():
                self.backbone.network.set_submodule(path, layer)
            model, how = nn.Sequential(self.backbone, head), self.settings.incremental
            self.backbone.eval()
            return fit(nn.Identity(), model, data.images, columns, balanced(columns), how, seed, progress)
        finally:
            for path, linear in layers.items():
                linear.weight.data = rotated[path].weight().detach()
                self.backbone.network.set_submodule(path, linear)
            self.backbone.requires_grad_(True)

    def _freeze_more(self, data: TrainingData) -> None:
        """Freeze, beside what was frozen when the session began, what these pictures make important."""
        batch = self.settings.batch if self.in_base_session else 1
        found = self._importances(data, batch)
        chosen = most_important(found, self.settings.keep)
        self.mask = {path: self.mask_before[path] | chosen[path] for path in self.paths}

    def _importances(self, data: TrainingData, batch: int) -> dict[str, Tensor]:
        """Of each coefficient [o, d], in each layer: the sum over batches of its gradient's size."""
        layers, seen = self._layers(), torch.tensor(self.seen)
        columns = torch.searchsorted(seen, data.labels)
        rows = self.rows[seen].to(self.device)
        sums = {path: torch.zeros_like(layer.weight) for path, layer in layers.items()}
        self.backbone.eval()
        for chosen in torch.arange(len(data)).split(batch):
            logits = cosine_logits(self.backbone(data.images[chosen].to(self.device)), rows, self.temperature)
            loss = nn.functional.cross_entropy(logits, columns[chosen].to(self.device))
            gradients = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
            for path, gradient in zip(layers, gradients, strict=True):
                sums[path] += (gradient @ self.basis[path]).abs()
        return sums

    # ------------------------------------------------------------------------------ checkpoints

    def _tensors(self) -> dict[str, Tensor]:
        mine = {"basis": self.basis, "mask": self.mask, "mask_before": self.mask_before}
        named = {f"{name}.{path}": value for name, of in mine.items() for path, value in of.items()}
        return {**super()._tensors(), **named}

    def _take(self, tensors: dict[str, Tensor]) -> None:
        super()._take(tensors)
        for name, of in (("basis", self.basis), ("mask", self.mask), ("mask_before", self.mask_before)):
            for path in self.paths:
                of[path] = of_shape(tensors, f"{name}.{path}", of[path]).to(self.device)


@torch.no_grad()
def second_moment_basis(
    layers: dict[str, nn.Linear], backbone: nn.Module, images: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """For each layer the orthonormal eigenvectors [d, d], as columns, of its inputs' second moment over ``images``."""
    moments = {path: torch.zeros(layer.in_features, layer.in_features) for path, layer in layers.items()}

    def watch(path: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()
            moments[path] += (rows.T @ rows).cpu()

        return layers[path].register_forward_pre_hook(add)

    hooks = [watch(path) for path in layers]
    backbone.eval()
    try:
        for part in images.split(64):
            backbone(part.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return {
        path: torch.linalg.eigh(m.double()).eigenvectors.float().to(device) for path, m in moments.items()
    }


def most_important(importances: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """True at the largest ``keep`` of all importances [o, d] of all layers together."""
    every = torch.cat([value.flatten() for value in importances.values()])
    count = round(keep * len(every))
    chosen = torch.zeros(len(every), dtype=torch.bool, device=every.device)
    chosen[every.argsort(descending=True, stable=True)[:count]] = True
    parts = chosen.split([value.numel() for value in importances.values()])
    return {path: part.view_as(importances[path]) for path, part in zip(importances, parts, strict=True)}
