"""`ops.decode_step` on a CPU: a step costs one read of the weights, so that read must be fast.

Measured on two cores (AMD EPYC, torch 2.14.1, float32, weights not in cache; GB/s of weights), on
one day, and on another day when the machine read memory at half that rate:

    rows   N x K         F.linear   mm(weight, x.T)   oneDNN
    1      2304 x 768    19         19                39
    4      2304 x 768    13 / 7.0   43 / 17           31 / 11
    4      768 x 2048    13 / 7.1   17 / 14           29 / 12
    8      2304 x 768         6.7        8.3               11
    16     2304 x 768    11 / 6.8   13 / 9.2          24 / 8.1
    128    2304 x 768    3.1        3.1               6.9

`F.linear` uses MKL for float32, which is slow at all sizes on that processor; for half precision it
uses oneDNN. All three read the weight as it lies in memory; nothing is packed or copied. oneDNN's
packed weights gave 17 where unpacked oneDNN gave 11 and `mm` 17, but need a second copy of them.
For K = 2048 the first two days disagree; on a third day oneDNN read 19 where `mm` read 13, so
oneDNN takes those products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding import BlockWeights, KVCache, LayerCache, StepWeights, row_of
from ..functional import layer_norm, modulated

# What torch.compile makes of a linear layer; there is no public name for it. Checked once, because
# a trace cannot check.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def decode_step(
    code: Tensor, embedding: Tensor, weights: StepWeights, cache: KVCache,
    position: int | Tensor, length: int | Tensor, attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.decode_step`; ``attend`` is `ops.decode_attention`."""
    x, eps = embedding.index_select(0, code), weights.eps
    if weights.condition is not None:
        x.add_(weights.condition[:, 0])
    table = None if weights.rotary is None else turns(weights.rotary, position, x.dtype)
    for block, layer in zip(weights.blocks, cache, strict=True):
        condition, biases = block.condition, block.biases
        y = norm(x, block.attention_norm, condition, 0, eps)
        q = queries(y, block, layer, table, position, eps)
        mixed = attend(q, layer.keys, layer.values, length, **layer.scales)
        add(x, product(mixed.flatten(1), block.out, biases.out), condition, 2)
        y = hidden(norm(x, block.ffn_norm, condition, 3, eps), block)
        add(x, product(y, block.down, biases.down), condition, 5)
    y = norm(x, weights.norm, weights.condition, 1, eps)
    logits = product(y, weights.head, weights.head_bias).contiguous()
    return logits if logits.dtype == torch.float64 else logits.float()


def turns(rotary: Tensor, position: int | Tensor, dtype: torch.dtype) -> Tensor:
    """The rotations of one position, [1, D / 2] complex."""
    # As complex numbers, q and k rotate together, and pairs are never separated. A copy, because
    # complex numbers must start at even offsets.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = row_of(rotary, position).to(wide, copy=True)
    return torch.view_as_complex(table.contiguous())


def queries(
    x: Tensor, block: BlockWeights, layer: LayerCache, table: Tensor | None,
    position: int | Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """Return the finished queries [R, H, D], and write keys and values to the cache."""
    R, H, _, D = layer.keys.shape
    qkv = product(x, block.qkv, block.biases.qkv).contiguous()
    v = qkv[:, 2 * H * D :].view(R, H, D)
    qk = qkv[:, : 2 * H * D].view(R, 2, H, D)
    if block.head_norms is not None:
        norms, (q, k) = block.head_norms, qk.unbind(1)
        q = layer_norm(q, norms.query_weight, norms.query_bias, eps, x.dtype)
        k = layer_norm(k, norms.key_weight, norms.key_bias, eps, x.dtype)
        qk = torch.stack([q, k], dim=1)
    if table is not None:
        qk = qk if qk.dtype == torch.float64 else qk.float()
        # In place: this function owns the product.
        torch.view_as_complex(qk.view(R, 2 * H, D // 2, 2)).mul_(table)
    q, k = qk.to(x.dtype).unbind(1)
    layer.append(position, k, v)
    return q


def hidden(x: Tensor, block: BlockWeights) -> Tensor:
    """Return the input of the feed-forward layer's second product, [R, F]."""
    x = product(x, block.up, block.biases.up)
    if len(block.up) == block.down.shape[1]:
        return F.gelu(x)
    gate, up = x.chunk(2, dim=-1)
    # Both may be transposed in memory; the output of their product is not.
    return torch.mul(F.silu(gate, inplace=True), up, out=gate.new_empty(gate.shape))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, x [B, K], weight [N, K]: [B, N] of any strides; no gradients."""
    rows, K = x.shape
    if x.dtype != torch.float32 or x.device.type != "cpu" or rows == 0 or K == 0:
        return F.linear(x, weight, bias)
    if 2 <= rows <= 5 and K < 2048:
        # Contiguous, because the product otherwise takes a slow path.
        y = torch.mm(weight, x.contiguous().T).T
        return y if bias is None else y.add_(bias)
    if _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def add(x: Tensor, y: Tensor, condition: Tensor | None, at: int) -> None:
    """Add ``y`` to ``x`` in place, with a condition times its gate ``condition[:, at]``."""
    if condition is None:
        x.add_(y)
    else:
        x.addcmul_(y, condition[:, at])


def norm(x: Tensor, weight: Tensor | None, condition: Tensor | None, at: int, eps: float) -> Tensor:
    """RMSNorm, or LayerNorm with the shift ``condition[:, at]`` and the gain that follows it."""
    if condition is None:
        return rms_norm(x, weight, eps)
    return modulated(x, condition[:, at], condition[:, at + 1], eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Like `functional.rms_norm`, in fewer operations."""
    if x.dtype == torch.float64:
        return F.rms_norm(x, weight.shape, weight, eps)
    # torch's own is not one kernel on a CPU but eight operations, some of them for gradients.
    wide = x.float()
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse).to(x.dtype).mul_(weight)
