"""Reference of `ops.decode_step`: embed a code, run all blocks, and predict the next code."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding import BlockWeights, KVCache, LayerCache, StepWeights, row_of
from ..functional import layer_norm, modulated, rms_norm, rotate


def decode_step(
    code: Tensor, embedding: Tensor, weights: StepWeights, cache: KVCache,
    position: int | Tensor, length: int | Tensor, attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.decode_step`; ``attend`` is `ops.decode_attention`."""
    x, eps, condition = F.embedding(code, embedding), weights.eps, weights.condition
    if condition is not None:
        x = x + condition[:, 0]
    for block, layer in zip(weights.blocks, cache, strict=True):
        y = norm(x, block.attention_norm, block.condition, 0, eps)
        y = attention(y, block, layer, weights, position, length, attend)
        x = x + gated(y, block.condition, 2)
        y = feed_forward(norm(x, block.ffn_norm, block.condition, 3, eps), block)
        x = x + gated(y, block.condition, 5)
    logits = F.linear(norm(x, weights.norm, condition, 1, eps), weights.head, weights.head_bias)
    return logits if logits.dtype == torch.float64 else logits.float()


def norm(x: Tensor, weight: Tensor | None, condition: Tensor | None, at: int, eps: float) -> Tensor:
    """RMSNorm, or LayerNorm with the shift ``condition[:, at]`` and the gain that follows it."""
    if condition is None:
        return rms_norm(x, weight, eps)
    return modulated(x, condition[:, at], condition[:, at + 1], eps)


def gated(y: Tensor, condition: Tensor | None, at: int) -> Tensor:
    return y if condition is None else y * condition[:, at]


def attention(
    x: Tensor, block: BlockWeights, layer: LayerCache, weights: StepWeights,
    position: int | Tensor, length: int | Tensor, attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    H, D = layer.keys.shape[1], layer.keys.shape[3]
    qkv = F.linear(x, block.qkv, block.biases.qkv)
    q, k, v = qkv.unflatten(-1, (3, H, D)).unbind(1)
    if block.head_norms is not None:
        norms, eps = block.head_norms, weights.eps
        q = layer_norm(q, norms.query_weight, norms.query_bias, eps, q.dtype)
        k = layer_norm(k, norms.key_weight, norms.key_bias, eps, k.dtype)
    if weights.rotary is not None:
        table = row_of(weights.rotary, position)
        q, k = rotate(q, table), rotate(k, table)
    layer.append(position, k, v)
    mixed = attend(q, layer.keys, layer.values, length, **layer.scales)
    return F.linear(mixed.flatten(1), block.out, block.biases.out)


def feed_forward(x: Tensor, block: BlockWeights) -> Tensor:
    x = F.linear(x, block.up, block.biases.up)
    if len(block.up) == block.down.shape[1]:
        x = F.gelu(x)
    else:
        gate, up = x.chunk(2, dim=-1)
        x = F.silu(gate) * up
    return F.linear(x, block.down, block.biases.down)
