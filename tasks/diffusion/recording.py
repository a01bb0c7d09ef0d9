"""Noise predictions without gradient, recorded once for each shape, then run without Python in between.

On a processor about 5 ms of each prediction are Python between the operations: a quarter of an update's chain on
the miniature, next to nothing for a large model. A recording (``torch.jit.trace``) is the same operations on the
same parameters. So what it returns equals bit for bit what the model returns, and weights that are exchanged later,
as ``adapters.merged`` does, are the ones it computes with. It is made once a shape has come often enough to pay.
What cross-attention makes of the prompts, its keys and values, is the same at each step: a chain computes it once.
What the blocks make of the timestep is the same in each chain, whatever the adapter: it is kept for good.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Self, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

OFTEN = 60
"""Predictions of one shape after which it is recorded; making a recording takes as long as it saves in so many."""

_tracing = Lock()

Recording: TypeAlias = Callable[..., Tensor]
Shape: TypeAlias = tuple[torch.Size, torch.Size, torch.Size]


class Recorder:
    """Predicts as the model does without an adapter, or with one that is merged into its weights."""

    def __init__(self, unet: "UNet2DConditionModel", often: int = OFTEN) -> None:
        """Args: unet: frozen, in evaluation mode, on the CPU. often: see :data:`OFTEN`."""
        self._unet, self._often = unet, often
        self._seen: Counter[Shape] = Counter()
        self._recordings: dict[Shape, Recording] = {}
        self._of_time: dict[tuple[Shape, float], list[Tensor]] = {}
        self._context: Tensor | None = None
        self._of_prompts: list[Tensor] = []

    def begun(self) -> Self:
        """Itself, at the start of a chain: the weights may be others now, so nothing is known of the prompts."""
        self._context = None
        return self

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "n c h w"], timestep: Tensor, context: Float[Tensor, "n tokens d"]
    ) -> Float[Tensor, "n c h w"]:
        """The prediction, without gradient."""
        shape = (x.shape, timestep.shape, context.shape)
        moment = (shape, timestep.item())
        self._seen[shape] += 1
        if moment not in self._of_time or self._seen[shape] <= self._often:
            return self._plain(moment, x, timestep, context)
        if self._context is None or not torch.equal(self._context, context):
            self._context = context
            self._of_prompts = [layer(context) for layer in _prompt_layers(self._unet)]
        given = (*self._of_prompts, *self._of_time[moment])
        if shape not in self._recordings:
            self._recordings[shape] = _recorded(self._unet, x, timestep, context, given)
        return self._recordings[shape](x, timestep, context, *given)

    def _plain(self, moment: tuple[Shape, float], x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """The model's own prediction, in which what it makes of the timestep is noted."""
        with _noted(_time_layers(self._unet)) as values:
            prediction = self._unet(x, timestep, context, return_dict=False)[0]
        self._of_time[moment] = values()
        return prediction


def _prompt_layers(unet: "UNet2DConditionModel") -> list[nn.Module]:
    """The layers that make keys and values of the prompts, in the model's order."""
    from diffusers.models.attention_processor import Attention

    crossing = [m for m in unet.modules() if isinstance(m, Attention) and m.is_cross_attention]
    return [layer for attention in crossing for layer in (attention.to_k, attention.to_v)]


def _time_layers(unet: "UNet2DConditionModel") -> list[nn.Module]:
    """The layers that embed the timestep and put it into each block, in the model's order; no adapter is on them."""
    from diffusers.models.resnet import ResnetBlock2D

    blocks = [m for m in unet.modules() if isinstance(m, ResnetBlock2D) and m.time_emb_proj is not None]
    return [unet.time_embedding, *(block.time_emb_proj for block in blocks)]


@contextmanager
def _noted(layers: Sequence[nn.Module]) -> Iterator[Callable[[], list[Tensor]]]:
    """What layers return for a while; call what is yielded to have it."""
    noted: dict[int, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output, n=n: noted.update({n: output}))
        for n, layer in enumerate(layers)
    ]
    try:
        yield lambda: [noted[n] for n in range(len(layers))]
    finally:
        for hook in hooks:
            hook.remove()


class _Positional(nn.Module):
    """The model as a function of tensors alone, which is what can be recorded."""

    def __init__(self, unet: "UNet2DConditionModel") -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, *given: Tensor) -> Tensor:
        with _given([*_prompt_layers(self.unet), *_time_layers(self.unet)], given):
            return self.unet(x, timestep, context, return_dict=False)[0]


@contextmanager
def _given(layers: Sequence[nn.Module], values: Sequence[Tensor]) -> Iterator[None]:
    """Layers that return given values for a while."""
    for layer, value in zip(layers, values, strict=True):
        layer.forward = lambda *_, value=value: value
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _recorded(
    unet: "UNet2DConditionModel", x: Tensor, timestep: Tensor, context: Tensor, given: Sequence[Tensor]
) -> Recording:
    with _tracing, warnings.catch_warnings():  # torch keeps names of what it traces for the whole process
        # shapes become constants, as they should: each shape has a recording of its own
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", FutureWarning)  # torch advises its compilers, which take minutes
        return torch.jit.trace(_Positional(unet), (x, timestep, context, *given), check_trace=False)
