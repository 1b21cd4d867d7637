"""Portable `ops.decode_attention`: torch's fused attention over the live positions.

On a GPU only where the length is an int. With one on the device torch's attention needs a mask, and
a mask does not keep NaN of dead positions out: clearing them first costs what the reference does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def unsupported_reason(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor
) -> str | None:
    """Why this cannot take the call, or None."""
    if q.device.type != "cpu" and isinstance(length, Tensor):
        return "it reads the length, which is free on a CPU only"
    if torch.compiler.is_compiling() and isinstance(length, Tensor):
        return "it reads the length, which torch.compile cannot trace"
    return None


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor) -> Tensor:
    """See `vfmtok_fast.ops.decode_attention`; takes what `unsupported_reason` lets pass."""
    if isinstance(length, Tensor):
        lengths = length.flatten().tolist()
        if len(lengths) > 1:
            rows = zip(q.split(1), k_cache.split(1), v_cache.split(1), lengths, strict=True)
            return torch.cat([decode_attention(*row) for row in rows])
        (length,) = lengths or [1]
    B, H, D = q.shape
    G = k_cache.shape[1]
    # Queries that share a head's keys take the place of positions.
    mixed = F.scaled_dot_product_attention(
        q.reshape(B, G, H // G, D), k_cache[:, :, :length], v_cache[:, :, :length]
    )
    return mixed.reshape(B, H, D)
