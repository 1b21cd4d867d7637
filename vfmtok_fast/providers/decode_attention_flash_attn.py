"""`ops.decode_attention` with flash-attn's `flash_attn_with_kvcache`, if that is installed.

Source: https://github.com/Dao-AILab/flash-attention, `flash_attn/flash_attn_interface.py`: caches
[B, T, G, D] with a last stride of 1, lengths int or int32 [B].
"""

from __future__ import annotations

import torch
from flash_attn import flash_attn_with_kvcache
from torch import Tensor

from .trial import Trial


def unsupported_reason(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, **scales: Tensor | None
) -> str | None:
    """Why this cannot take the call, or None."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        return "it has no backward pass (torch.no_grad() says that none is needed)"
    return trial.reason(q, k_cache, v_cache, scales)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor) -> Tensor:
    """See `vfmtok_fast.ops.decode_attention`; takes calls that `unsupported_reason` accepts."""
    if isinstance(length, Tensor):
        length = length.reshape(-1).to(torch.int32).expand(q.shape[0]).contiguous()
    mixed = flash_attn_with_kvcache(
        q[:, None], k_cache.transpose(1, 2), v_cache.transpose(1, 2), cache_seqlens=length
    )
    return mixed[:, 0]


trial = Trial(decode_attention)
