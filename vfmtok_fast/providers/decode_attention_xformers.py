"""`ops.decode_attention` with xformers' `memory_efficient_attention`, if that is installed.

Source: https://github.com/facebookresearch/xformers, `xformers/ops/fmha`: [B, M, H, D], or for
grouped queries [B, M, G, H / G, D], with keys and values expanded along the fourth dimension.
"""

from __future__ import annotations

from torch import Tensor
from xformers.ops import memory_efficient_attention

from .trial import Trial


def unsupported_reason(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, **scales: Tensor | None
) -> str | None:
    """Why this cannot take the call, or None."""
    # Its masks for padded caches are built from lists of lengths, which would have to be read.
    if isinstance(length, Tensor):
        return "it takes the length as an int, not as a tensor"
    return trial.reason(q, k_cache, v_cache, scales)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor) -> Tensor:
    """See `vfmtok_fast.ops.decode_attention`; takes calls that `unsupported_reason` accepts."""
    B, H, D = q.shape
    heads = k_cache.shape[1]
    k, v = (cache[:, :, :length].transpose(1, 2) for cache in (k_cache, v_cache))
    if H == heads:
        return memory_efficient_attention(q[:, None], k, v)[:, 0]
    shape = (B, length, heads, H // heads, D)
    k, v = (x[:, :, :, None].expand(shape) for x in (k, v))
    return memory_efficient_attention(q.view(B, 1, heads, H // heads, D), k, v).reshape(B, H, D)


trial = Trial(decode_attention)
