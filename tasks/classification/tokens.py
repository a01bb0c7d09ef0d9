"""A ViT's tokens from inside, for methods that add to them: embedding, position, attention with a prefix.

Only timm's plain VisionTransformer is known: patches, one class token, pre-norm blocks with one ``qkv`` each.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from tasks.classification.backbone import Backbone

BlockCall = Callable[[int, Block, Tensor], Tensor]
"""What is done in block i: (i, block, tokens [n, t, d]) to tokens [n, t, d]."""


def plain_vit(backbone: Backbone, method: str) -> VisionTransformer:
    """The network as a ViT whose tokens ``method`` can add to.

    Raises:
        ValueError: It is another network.
    """
    network = backbone.network
    plain = isinstance(network, VisionTransformer) and network.cls_token is not None
    if not plain or not all(_is_plain(block) for block in cast(Any, network).blocks):
        raise ValueError(
            f"{method} reaches into the blocks of a plain ViT with a class token, but this classifier is a "
            f"{type(network).__name__}; choose a ViT, as classifier=vit_b16"
        )
    return cast(VisionTransformer, network)


def _is_plain(block: object) -> bool:
    attention = getattr(block, "attn", None)
    return type(block) is Block and type(attention) is Attention and attention.gate is None


def embed(backbone: Backbone, images: Tensor) -> Tensor:
    """Tokens [n, t, d], the class token first, that enter the first block, of pictures [n, 3, h, w], 8-bit or in [0, 1]."""
    vit = cast(Any, backbone.network)
    patches = vit.patch_embed(backbone.prepare(images))
    return cast(Tensor, vit.norm_pre(vit.patch_drop(vit._pos_embed(patches))))


def insert(vit: VisionTransformer, tokens: Tensor, extra: Tensor) -> Tensor:
    """``extra`` [n, l, d] behind the class token of [n, t, d], at the class token's position: [n, t + l, d]."""
    position = None if vit.no_embed_class else vit.pos_embed
    if position is not None:
        extra = extra + position[:, :1]
    return torch.cat([tokens[:, :1], extra, tokens[:, 1:]], 1)


def through(vit: VisionTransformer, tokens: Tensor, call: BlockCall | None = None) -> Tensor:
    """Tokens [n, t, d] through all blocks, each as ``call`` has it, and the last norm."""
    again = cast(Any, vit).grad_checkpointing and torch.is_grad_enabled()
    for index, block in enumerate(cast(Any, vit).blocks):
        if again:
            tokens = cast(Tensor, checkpoint(call or _plainly, index, block, tokens, use_reentrant=False))
        else:
            tokens = (call or _plainly)(index, block, tokens)
    return cast(Tensor, cast(Any, vit).norm(tokens))


def _plainly(index: int, block: Block, tokens: Tensor) -> Tensor:
    return cast(Tensor, block(tokens))


def split_heads(attention: Attention, tokens: Tensor) -> Tensor:
    """[n, l, heads * w] to [n, heads, l, w]."""
    return tokens.unflatten(2, (attention.num_heads, attention.head_dim)).transpose(1, 2)


def heads_of(attention: Attention, tokens: Tensor, keys: Tensor | None, values: Tensor | None) -> Tensor:
    """What each head gives [n, heads, t, w] for tokens [n, t, d], before it is projected.

    Args:
        attention: A block's.
        tokens: Normalised already, as the block does.
        keys: [n, heads, l, w], put in front of the tokens' own keys, or None.
        values: The same for the values.
    """
    queries, own_keys, own_values = (
        split_heads(attention, part) for part in attention.qkv(tokens).chunk(3, dim=2)
    )
    queries, own_keys = attention.q_norm(queries), attention.k_norm(own_keys)
    if keys is not None and values is not None:
        own_keys = torch.cat([keys.to(own_keys.dtype), own_keys], 2)
        own_values = torch.cat([values.to(own_values.dtype), own_values], 2)
    return scaled_dot_product_attention(queries, own_keys, own_values)


def attended(block: Block, tokens: Tensor, keys: Tensor | None, values: Tensor | None) -> Tensor:
    """A block's first half: tokens [n, t, d] plus what its attention gives, with a prefix as in :func:`heads_of`."""
    attention = cast(Attention, block.attn)
    heads = heads_of(attention, block.norm1(tokens), keys, values)
    joined = attention.norm(heads.transpose(1, 2).flatten(2))
    return cast(Tensor, tokens + block.ls1(attention.proj(joined)))


def with_prefix(block: Block, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """A whole block over tokens [n, t, d] with ``keys`` and ``values`` [n, heads, l, w] in front of its own."""
    tokens = attended(block, tokens, keys, values)
    return cast(Tensor, tokens + block.ls2(block.mlp(block.norm2(tokens))))
