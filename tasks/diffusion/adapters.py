"""LoRA on the noise predictor: W x + (alpha / rank) B A x in every attention projection, A and B in float32.

Saved in diffusers' LoRA format, so that any Stable Diffusion program loads it; that format knows no alpha,
hence alpha / rank is folded into B. The file's bytes depend on the weights alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from peft.tuners.lora import LoraLayer

NAME = "fscil"
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
FILE = "pytorch_lora_weights.safetensors"

_SPELLING = ((f".lora_A.{NAME}.weight", ".lora.down.weight"), (f".lora_B.{NAME}.weight", ".lora.up.weight"))


def attach(unet: "UNet2DConditionModel", rank: int, alpha: float, seed: int) -> list[nn.Parameter]:
    """Attach a new adapter that changes nothing yet: A is normal with deviation 1 / rank, B is zero.

    Args:
        unet: without an adapter.
        rank: columns of B, rows of A.
        alpha: the adapter is scaled by alpha / rank.
        seed: of A.

    Returns:
        The trainable parameters, in the model's order.

    Raises:
        ValueError: an adapter is attached already, or rank or alpha is not positive.
    """
    from peft import LoraConfig  # slow to import, and only tuned generators need it

    if is_attached(unet):
        raise ValueError("the noise predictor already has an adapter; remove it first")
    if rank < 1 or alpha <= 0:
        raise ValueError(f"an adapter needs rank >= 1 and alpha > 0, got {rank=} and {alpha=}")
    with torch.random.fork_rng():
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS)), NAME)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in _parameters(unet):
        start = torch.zeros(parameter.shape)
        if ".lora_A." in name:
            start.normal_(std=1 / rank, generator=generator)
        parameter.data = start.to(parameter.device)
    return trainable(unet)


def is_attached(unet: "UNet2DConditionModel") -> bool:
    """Whether the noise predictor has an adapter."""
    return NAME in (getattr(unet, "peft_config", None) or {})


def trainable(unet: "UNet2DConditionModel") -> list[nn.Parameter]:
    """The adapter's parameters, in the model's order; none without an adapter."""
    return [parameter for _, parameter in _parameters(unet)]


def remove(unet: "UNet2DConditionModel") -> None:
    """Take the adapter off, if there is one; the base weights were never touched."""
    if is_attached(unet):
        unet.unload_lora()


def set_alpha(unet: "UNet2DConditionModel", alpha: float) -> None:
    """Change the scale alpha / rank without changing what the adapter computes (B absorbs the ratio)."""
    for layer in _layers(unet):
        scale = alpha / layer.r[NAME]
        layer.lora_B[NAME].weight.data.mul_(layer.scaling[NAME] / scale)
        layer.lora_alpha[NAME], layer.scaling[NAME] = alpha, scale


def rank_of(unet: "UNet2DConditionModel") -> int:
    """The attached adapter's rank."""
    return next(_layers(unet)).r[NAME]


@contextmanager
def disabled(unet: "UNet2DConditionModel") -> Iterator[None]:
    """The base model for a while; its adapter, if it has one, stays attached."""
    layers = list(_layers(unet))
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def merged(unet: "UNet2DConditionModel") -> Iterator[bool]:
    """The adapter added to the base weights for a while: the same predictions with fewer operations.

    The base weights are put aside, not subtracted from again, so they come back bit for bit. A base in half
    precision would round the adapter away and is left as it is.

    Yields:
        Whether the weights are now all there is: no adapter works beside them.
    """
    layers = list(_layers(unet))
    if not layers or layers[0].get_base_layer().weight.dtype != torch.float32:
        yield not layers
        return
    weights = [(layer.get_base_layer().weight, layer.get_delta_weight(NAME)) for layer in layers]
    originals = [weight.data for weight, _ in weights]
    with disabled(unet):
        for weight, delta in weights:
            weight.data = weight.data + delta.detach()
        try:
            yield True
        finally:
            for (weight, _), original in zip(weights, originals, strict=True):
                weight.data = original


def save(unet: "UNet2DConditionModel", folder: Path) -> None:
    """Write ``pytorch_lora_weights.safetensors`` into ``folder``, which is made if need be.

    Raises:
        ValueError: there is no adapter.
    """
    if not is_attached(unet):
        raise ValueError("the noise predictor has no adapter to save")
    scale = next(_layers(unet)).scaling[NAME]
    weights = {}
    for name, parameter in _parameters(unet):
        factor = scale if ".lora_B." in name else 1.0
        weights[_file_key(name)] = (parameter.detach() * factor).cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    # one metadata key only: several would be written in no fixed order
    (folder / FILE).write_bytes(to_bytes(weights, metadata={"format": "pt"}))


def load(unet: "UNet2DConditionModel", folder: Path) -> list[nn.Parameter]:
    """Attach the adapter saved in ``folder``; alpha = rank.

    Returns:
        The trainable parameters, in the model's order.

    Raises:
        ValueError: no such file, a damaged one, or one made for another model.
    """
    weights = _read(folder / FILE)
    ranks = {tensor.shape[0] for key, tensor in weights.items() if key.endswith(".down.weight")}
    if len(ranks) != 1:
        raise ValueError(f"{folder / FILE} is no adapter of one rank (found {sorted(ranks)})")
    (rank,) = ranks
    attach(unet, rank, rank, seed=0)
    parameters = {_file_key(name): parameter for name, parameter in _parameters(unet)}
    if {k: v.shape for k, v in weights.items()} != {k: p.shape for k, p in parameters.items()}:
        remove(unet)
        raise ValueError(f"{folder / FILE} was made for another model: its layers are not this generator's")
    for key, parameter in parameters.items():
        parameter.data.copy_(weights[key])
    return list(parameters.values())


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the adapter {path}: {error}") from error


def _parameters(unet: "UNet2DConditionModel") -> Iterator[tuple[str, nn.Parameter]]:
    marks = tuple(ours for ours, _ in _SPELLING)
    return ((name, p) for name, p in unet.named_parameters() if name.endswith(marks))


def _layers(unet: "UNet2DConditionModel") -> Iterator["LoraLayer"]:
    return (m for m in unet.modules() if NAME in getattr(m, "lora_B", {}))


def _file_key(name: str) -> str:
    for ours, theirs in _SPELLING:
        name = name.replace(ours, theirs)
    return f"unet.{name}"
