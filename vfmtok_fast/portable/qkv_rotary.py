"""Portable `ops.qkv_rotary`: q and k rotate together, as complex numbers, and the product is
that of `linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import linear, rms_norm


def qkv_rotary(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    rotary: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """See `vfmtok_fast.ops.qkv_rotary`."""
    B, H, _, D = k_cache.shape
    qkv = linear(rms_norm(x, norm_weight, eps), qkv_weight)
    at = position if isinstance(position, Tensor) else torch.tensor(position, device=x.device)
    at = at.reshape(1).long()
    qk = qkv[:, : 2 * H * D]
    wide = qk if qk.dtype == torch.float64 else qk.float()
    table = torch.view_as_complex(rotary.to(wide.dtype).index_select(0, at))
    pairs = torch.view_as_complex(wide.reshape(B, 2 * H, D // 2, 2))
    rotated = torch.view_as_real(pairs * table).to(x.dtype).view(B, 2, H, 1, D)
    k_cache.index_copy_(2, at, rotated[:, 1])
    v_cache.index_copy_(2, at, qkv[:, 2 * H * D :].view(B, H, 1, D))
    return rotated[:, 0, :, 0]
