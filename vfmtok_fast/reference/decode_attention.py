"""Reference of `ops.decode_attention`: one query against the live part of a padded KV cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..decoding import in_full


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.decode_attention`."""
    k_cache = in_full(k_cache, k_scale, q.dtype)
    v_cache = in_full(v_cache, v_scale, q.dtype)
    B, H, D = q.shape
    heads, capacity = k_cache.shape[1], k_cache.shape[2]
    if isinstance(length, int):
        k, v, live = k_cache[:, :, :length], v_cache[:, :, :length], None
    else:
        # Dead positions may hold anything, including NaN, which a weight of zero would not remove.
        live = torch.arange(capacity, device=q.device) < length.long().reshape(-1, 1)
        live = live[:, None, :, None]
        k, v = k_cache.masked_fill(~live, 0), v_cache.masked_fill(~live, 0)

    q = q.view(B, heads, H // heads, D)
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(D)
    scores = scores if q.dtype == torch.float64 else scores.float()
    if live is not None:
        scores = scores.masked_fill(~live.transpose(-1, -2), float("-inf"))
    return (scores.softmax(dim=-1).to(v.dtype) @ v).reshape(B, H, D)
