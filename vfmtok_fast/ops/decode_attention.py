"""Attention from one new position to a KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import decode_attention as reference
from ..switch import Op
from .checks import check_on, check_position, check_same, check_shape, check_tensor

_op = Op("decode_attention", reference.decode_attention, libraries=("flash_attn", "xformers"))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    length: int | Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attend from one query position to the first ``length`` positions of a static KV cache.

    Softmax of ``q.k / sqrt(D)`` in float32 (float64 for float64 input). For inference only: there
    is no backward pass. The order of summation, and so the last bits, may depend on the memory
    layout of the caches.

    Args:
        q: [B, H, D], the new position after rotary embedding.
        k_cache, v_cache: [B, G, T, D], with G key-value heads; H is a multiple of G (grouped-query
            attention). Positions from ``length`` on are never used and may hold anything. With
            scales, both are int8 and stand for ``scale[..., None] * cache``.
        length: number of live positions, in 1..T: an int, or an integer tensor of one element or
            [B] that stays on its device (its values are not checked, which would need a
            synchronisation).
        k_scale, v_scale: [B, G, T] float32, both or neither.

    Returns:
        [B, H, D], dtype of ``q``.

    Raises:
        TypeError: not floating tensors, two dtypes, int8 without scales, or a length that is not
            an integer.
        ValueError: shapes that do not fit together, two devices, or an int length outside 1..T.

    Source: the KV-cached attention of LlamaGen's generator.
    """
    name = "decode_attention"
    check_tensor(name, "q", q, "[B, H, D]", 3)
    if k_scale is None and v_scale is None:
        check_tensor(name, "k_cache", k_cache, "[B, G, T, D]", 4)
        check_tensor(name, "v_cache", v_cache, "[B, G, T, D]", 4)
        check_same(name, q=q, k_cache=k_cache, v_cache=v_cache)
        scales = {}
    else:
        _check_8_bits(q, k_cache=k_cache, v_cache=v_cache, k_scale=k_scale, v_scale=v_scale)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    B, H, D = q.shape
    heads, capacity = k_cache.shape[1], k_cache.shape[2]
    check_shape(name, "k_cache", k_cache, (B, heads, capacity, D))
    check_shape(name, "v_cache", v_cache, (B, heads, capacity, D))
    if heads == 0 or H % heads:
        raise ValueError(
            f"{name}: query heads must be a multiple of key-value heads, got {H} and {heads}"
        )
    check_position(name, "length", length, 1, capacity + 1, (1, B), q=q)
    for part, scale in scales.items():
        check_shape(name, part, scale, (B, heads, capacity))
    return _op(q, k_cache, v_cache, length, **scales)


def _check_8_bits(q: Tensor, **parts: object) -> None:
    """Require int8 caches and float32 scales on the device of q."""
    for part, value in parts.items():
        dtype, ndim = (torch.int8, 4) if part.endswith("cache") else (torch.float32, 3)
        if not isinstance(value, Tensor) or value.dtype != dtype or value.ndim != ndim:
            got = type(value).__name__
            if isinstance(value, Tensor):
                got = f"{value.dtype} of shape {tuple(value.shape)}"
            raise TypeError(
                f"decode_attention: with scales {part} must be {dtype} of {ndim} dimensions, "
                f"got {got}"
            )
        check_on("decode_attention", part, value, "q", q)
