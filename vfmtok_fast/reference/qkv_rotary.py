"""Reference of `ops.qkv_rotary`: normalise, project, rotate, and append to the KV cache."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dequantized import dequantized
from .rms_norm import rms_norm
from .rotary import rotate


def qkv_rotary(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    rotary: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See `vfmtok_fast.ops.qkv_rotary`."""
    qkv = F.linear(rms_norm(x, norm_weight, eps), dequantized(qkv_weight, scale, x.dtype))
    q, k, v = qkv.unflatten(-1, (3, *k_cache.shape[1::2])).unbind(1)
    return append(q, k, v, rotary, k_cache, v_cache, position)


def append(
    q: Tensor, k: Tensor, v: Tensor, rotary: Tensor, k_cache: Tensor, v_cache: Tensor,
    position: int | Tensor,
) -> Tensor:  # fmt: skip
    """Rotate q and k [B, H, D], write k and v at ``position``, and return q."""
    if isinstance(position, int):
        table = rotary[position]
        k_cache[:, :, position], v_cache[:, :, position] = rotate(k, table), v
    else:
        at = position.reshape(1).long()
        table = rotary.index_select(0, at)
        k_cache.index_copy_(2, at, rotate(k, table)[:, :, None])
        v_cache.index_copy_(2, at, v[:, :, None])
    return rotate(q, table)
