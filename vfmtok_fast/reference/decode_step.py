"""Reference of `ops.decode_step`: embed a code, go through all blocks, and predict the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .dequantized import dequantized
from .rms_norm import rms_norm
from .rotary import rotate

if TYPE_CHECKING:
    from ..kv_cache import KVCache, LayerCache
    from ..ops.decode_step import BlockWeights, StepWeights, Weight


def decode_step(
    code: Tensor,
    embedding: Tensor,
    weights: StepWeights,
    cache: KVCache,
    position: int | Tensor,
    length: int | Tensor,
) -> Tensor:
    """See `vfmtok_fast.ops.decode_step`."""
    rows = cache.layers[0].keys.shape[0]
    x = F.embedding(code, embedding).repeat(rows // max(len(code), 1), 1)
    for block, layer in zip(weights.blocks, cache, strict=True):
        x = x + attention(x, block, layer, weights, position, length)
        x = x + feed_forward(x, block, weights.eps)
    logits = linear(rms_norm(x, weights.norm, weights.eps), weights.head)
    return logits if logits.dtype == torch.float64 else logits.float()


def linear(x: Tensor, layer: Weight) -> Tensor:
    return F.linear(x, dequantized(layer.weight, layer.scale, x.dtype))


def attention(
    x: Tensor, block: BlockWeights, layer: LayerCache, weights: StepWeights,
    position: int | Tensor, length: int | Tensor,
) -> Tensor:  # fmt: skip
    # The op, whose implementation is a choice of its own.
    from ..ops.decode_attention import decode_attention

    H, D = layer.keys.shape[1], layer.keys.shape[3]
    qkv = linear(rms_norm(x, block.attention_norm, weights.eps), block.qkv)
    q, k, v = qkv.unflatten(-1, (3, H, D)).unbind(1)
    table = row_of(weights.rotary, position)
    append(layer, position, rotate(k, table), v)
    mixed = decode_attention(rotate(q, table), layer.keys, layer.values, length, **layer.scales)
    return linear(mixed.flatten(1), block.out)


def row_of(table: Tensor, position: int | Tensor) -> Tensor:
    """The row of one position [1, ...]; no value of a tensor is read."""
    if isinstance(position, int):
        return table[position : position + 1]
    return table.index_select(0, position.reshape(1).long())


def append(layer: LayerCache, position: int | Tensor, keys: Tensor, values: Tensor) -> None:
    """Write keys and values [R, H, D] of one position into the cache."""
    parts = ((layer.keys, layer.key_scale, keys), (layer.values, layer.value_scale, values))
    for cache, scales, new in parts:
        if scales is not None:
            new, scale = in_8_bits(new)
            _put(scales, position, scale)
        _put(cache, position, new)


def _put(cache: Tensor, position: int | Tensor, new: Tensor) -> None:
    if isinstance(position, int):
        cache[:, :, position] = new
    else:
        cache.index_copy_(2, position.reshape(1).long(), new[:, :, None])


def in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., D] and float32 scales [...]: the largest magnitude of each row / 127."""
    wide = x.float()
    scale = wide.abs().amax(-1) / 127
    # A row of zeros has any scale but zero.
    scale = torch.where(scale > 0, scale, 1.0)
    return (wide / scale[..., None]).round().to(torch.int8), scale


def feed_forward(x: Tensor, block: BlockWeights, eps: float) -> Tensor:
    x = rms_norm(x, block.ffn_norm, eps)
    return linear(F.silu(linear(x, block.gate)) * linear(x, block.up), block.down)
