"""Noise predictions without gradient, recorded once for each shape, then run without Python in between.

On a processor about 5 ms of each prediction are Python between the operations: a quarter of an update's chain on
the miniature, next to nothing for a large model. A recording (``torch.jit.trace``) is the same operations on the
same parameters. So what it returns equals bit for bit what the model returns, and weights that are exchanged later,
as ``adapters.merged`` does, are the ones it computes with. It is made once a shape has come often enough to pay.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

import torch
from diffusers import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

OFTEN = 60
"""Predictions of one shape after which it is recorded; making a recording takes as long as it saves in so many."""

Predictor: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
Shape: TypeAlias = tuple[torch.Size, torch.Size, torch.Size]


class Recorder:
    """Predicts as the model does without an adapter, or with one that is merged into its weights."""

    def __init__(self, unet: UNet2DConditionModel, often: int = OFTEN) -> None:
        """Args: unet: frozen, in evaluation mode, on the CPU. often: see :data:`OFTEN`."""
        self._model = _Positional(unet)
        self._often = often
        self._seen: Counter[Shape] = Counter()
        self._recordings: dict[Shape, Predictor] = {}

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "n c h w"], timestep: Tensor, context: Float[Tensor, "n tokens d"]
    ) -> Float[Tensor, "n c h w"]:
        """The prediction, without gradient."""
        shape = (x.shape, timestep.shape, context.shape)
        if (recording := self._recordings.get(shape)) is not None:
            return recording(x, timestep, context)
        self._seen[shape] += 1
        if self._seen[shape] > self._often:
            self._recordings[shape] = _recorded(self._model, x, timestep, context)
        return self._model(x, timestep, context)


class _Positional(nn.Module):
    """The model as a function of tensors alone, which is what can be recorded."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.unet(x, timestep, context, return_dict=False)[0]


def _recorded(model: nn.Module, *inputs: Tensor) -> Predictor:
    with warnings.catch_warnings():
        # shapes become constants, as they should: each shape has a recording of its own
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)  # torch advises its compilers, which take minutes
        return torch.jit.trace(model, inputs, check_trace=False)
