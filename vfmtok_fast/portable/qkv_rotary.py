"""Portable `ops.qkv_rotary`: q and k rotate together, as complex numbers, and the product is
that of `linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import linear, rms_norm
from .linear import unsupported_reason as unsupported_reason


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
    B, H, _, D = k_cache.shape
    qkv = linear(rms_norm(x, norm_weight, eps), qkv_weight, scale)
    v = qkv[:, 2 * H * D :].view(B, H, D)
    qk = qkv[:, : 2 * H * D]
    wide = qk if qk.dtype == torch.float64 else qk.float()
    rotary = rotary.to(wide.dtype)
    if isinstance(position, int):
        # A copy, for complex numbers must lie at even places.
        at, table = None, rotary[position].clone(memory_format=torch.contiguous_format)
    else:
        at = position.reshape(1).long()
        table = rotary.index_select(0, at)
    # In place: the product is this function's own.
    torch.view_as_complex(wide.view(B, 2 * H, D // 2, 2)).mul_(torch.view_as_complex(table))
    q, k = wide.to(x.dtype).view(B, 2, H, D).unbind(1)
    if at is None:
        # Less work than index_copy_, which a position on the device needs.
        k_cache[:, :, position], v_cache[:, :, position] = k, v
    else:
        k_cache.index_copy_(2, at, k[:, :, None])
        v_cache.index_copy_(2, at, v[:, :, None])
    return q
