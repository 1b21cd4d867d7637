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

# What torch.compile makes of a linear layer; there is no public name for it. Checked once, because
# a trace cannot check.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def decode_step(
    code: Tensor, embedding: Tensor, weights: StepWeights, cache: KVCache,
    position: int | Tensor, length: int | Tensor, attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.decode_step`; ``attend`` is `ops.decode_attention`."""
    x = embedding.index_select(0, code)
    # As complex numbers, q and k rotate together, and pairs are never separated. A copy, because
    # complex numbers must start at even offsets.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    table = row_of(weights.rotary, position).to(wide, copy=True)
    table = torch.view_as_complex(table.contiguous())
    for block, layer in zip(weights.blocks, cache, strict=True):
        y = rms_norm(x, block.attention_norm, weights.eps)
        q = queries(y, block, layer, table, position)
        mixed = attend(q, layer.keys, layer.values, length, **layer.scales)
        x.add_(product(mixed.flatten(1), block.out))
        x.add_(product(hidden(rms_norm(x, block.ffn_norm, weights.eps), block), block.down))
    logits = product(rms_norm(x, weights.norm, weights.eps), weights.head).contiguous()
    return logits if logits.dtype == torch.float64 else logits.float()


def queries(
    x: Tensor, block: BlockWeights, layer: LayerCache, table: Tensor, position: int | Tensor
) -> Tensor:
    """Return the rotated queries [R, H, D], and write keys and values to the cache."""
    R, H, _, D = layer.keys.shape
    qkv = product(x, block.qkv).contiguous()
    v = qkv[:, 2 * H * D :].view(R, H, D)
    qk = qkv[:, : 2 * H * D]
    qk = qk if qk.dtype == torch.float64 else qk.float()
    # In place: this function owns the product.
    torch.view_as_complex(qk.view(R, 2 * H, D // 2, 2)).mul_(table)
    q, k = qk.to(x.dtype).view(R, 2, H, D).unbind(1)
    layer.append(position, k, v)
    return q


def hidden(x: Tensor, block: BlockWeights) -> Tensor:
    """Return SwiGLU's gated products, [R, F]."""
    gate, up = product(x, block.gate_up).chunk(2, dim=-1)
    # Both may be transposed in memory; the output of their product is not.
    return torch.mul(F.silu(gate, inplace=True), up, out=gate.new_empty(gate.shape))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for x [B, K] and weight [N, K]: [B, N] of any strides; no gradients."""
    rows, K = x.shape
    if x.dtype != torch.float32 or x.device.type != "cpu" or rows == 0 or K == 0:
        return F.linear(x, weight)
    if 2 <= rows <= 5 and K < 2048:
        # Contiguous, because the product otherwise takes a slow path.
        return torch.mm(weight, x.contiguous().T).T
    if _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Like `functional.rms_norm`, in fewer operations."""
    if x.dtype == torch.float64:
        return F.rms_norm(x, weight.shape, weight, eps)
    # torch's own is not one kernel on a CPU but eight operations, some of them for gradients.
    wide = x.float()
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse).to(x.dtype).mul_(weight)
