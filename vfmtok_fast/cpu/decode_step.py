"""`ops.decode_step` on a CPU: all of a step costs one read of the weights, so that is to be fast.

Measured on two cores (AMD EPYC, torch 2.14.1, float32, weights not in cache; GB/s of weights), on
one day, and on another when the machine read memory at half that rate:

    rows   N x K         F.linear   mm(weight, x.T)   oneDNN
    1      2304 x 768    19         19                39
    4      2304 x 768    13 / 7.0   43 / 17           31 / 11
    4      768 x 2048    13 / 7.1   17 / 14           29 / 12
    8      2304 x 768         6.7        8.3               11
    16     2304 x 768    11 / 6.8   13 / 9.2          24 / 8.1
    128    2304 x 768    3.1        3.1               6.9

`F.linear` is MKL's for float32, and slow at all sizes on that processor. oneDNN is what it takes
for half precision. All read the weight as it lies in memory; nothing is packed or copied: oneDNN's
packed weights gave 17 where it gave 11 and `mm` 17, for a second copy of them. For K = 2048 the
first two days disagree; on a third oneDNN read 19 where `mm` read 13, so it has those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding import BlockWeights, KVCache, LayerCache, StepWeights, row_of

# What torch.compile makes of a linear layer; there is no public name for it. Asked once, for a
# trace cannot ask.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def decode_step(
    code: Tensor, embedding: Tensor, weights: StepWeights, cache: KVCache,
    position: int | Tensor, length: int | Tensor, attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.decode_step`; ``attend`` is `ops.decode_attention`."""
    x = embedding.index_select(0, code)
    # Complex numbers: q and k rotate together, and pairs are never taken apart. A copy, for they
    # must lie at even places.
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
    """Rotated queries [R, H, D]; keys and values go into the cache."""
    R, H, _, D = layer.keys.shape
    qkv = product(x, block.qkv).contiguous()
    v = qkv[:, 2 * H * D :].view(R, H, D)
    qk = qkv[:, : 2 * H * D]
    qk = qk if qk.dtype == torch.float64 else qk.float()
    # In place: the product is this function's own.
    torch.view_as_complex(qk.view(R, 2 * H, D // 2, 2)).mul_(table)
    q, k = qk.to(x.dtype).view(R, 2, H, D).unbind(1)
    layer.append(position, k, v)
    return q


def hidden(x: Tensor, block: BlockWeights) -> Tensor:
    """SwiGLU's gated products [R, F]."""
    gate, up = product(x, block.gate_up).chunk(2, dim=-1)
    # Both may lie the other way round; the product of the two sets that right.
    return torch.mul(F.silu(gate, inplace=True), up, out=gate.new_empty(gate.shape))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` for x [B, K] and weight [N, K]: [B, N] of any strides; no gradients."""
    rows, K = x.shape
    if x.dtype != torch.float32 or x.device.type != "cpu" or rows == 0 or K == 0:
        return F.linear(x, weight)
    if 2 <= rows <= 5 and K < 2048:
        # Contiguous, or the product takes another, slow way.
        return torch.mm(weight, x.contiguous().T).T
    if _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`, in fewer operations."""
    if x.dtype == torch.float64:
        return F.rms_norm(x, weight.shape, weight, eps)
    # Torch's own is no kernel on a CPU but eight operations, some of them for gradients.
    wide = x.float()
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse).to(x.dtype).mul_(weight)
