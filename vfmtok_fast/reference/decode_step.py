"""Reference of `ops.decode_step`: embed a code, run all blocks, and predict the next code."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding import BlockWeights, KVCache, LayerCache, StepWeights, row_of
from ..functional import rms_norm, rotate


def decode_step(
    code: Tensor, embedding: Tensor, weights: StepWeights, cache: KVCache,
    position: int | Tensor, length: int | Tensor, attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.decode_step`; ``attend`` is `ops.decode_attention`."""
    x = F.embedding(code, embedding)
    for block, layer in zip(weights.blocks, cache, strict=True):
        x = x + attention(x, block, layer, weights, position, length, attend)
        x = x + feed_forward(x, block, weights.eps)
    logits = F.linear(rms_norm(x, weights.norm, weights.eps), weights.head)
    return logits if logits.dtype == torch.float64 else logits.float()


def attention(
    x: Tensor, block: BlockWeights, layer: LayerCache, weights: StepWeights,
    position: int | Tensor, length: int | Tensor, attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    H, D = layer.keys.shape[1], layer.keys.shape[3]
    qkv = F.linear(rms_norm(x, block.attention_norm, weights.eps), block.qkv)
    q, k, v = qkv.unflatten(-1, (3, H, D)).unbind(1)
    table = row_of(weights.rotary, position)
    layer.append(position, rotate(k, table), v)
    mixed = attend(rotate(q, table), layer.keys, layer.values, length, **layer.scales)
    return F.linear(mixed.flatten(1), block.out)


def feed_forward(x: Tensor, block: BlockWeights, eps: float) -> Tensor:
    x = rms_norm(x, block.ffn_norm, eps)
    gate, up = F.linear(x, block.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, block.down)
