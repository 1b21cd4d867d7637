"""Attention of one new position over a KV cache."""

from __future__ import annotations

from torch import Tensor

from ..reference import decode_attention as reference
from ..switch import Op
from .checks import check_position, check_same, check_shape, check_tensor

_op = Op("decode_attention", reference.decode_attention, libraries=("flash_attn", "xformers"))


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor) -> Tensor:
    """Attend from one query position to the first ``length`` positions of a static KV cache.

    Softmax of ``q.k / sqrt(D)`` in float32 (float64 for float64 input). For inference: there is
    no backward pass. The order of sums, so the last bits, may depend on how the caches lie in
    memory.

    Args:
        q: [B, H, D], the new position after rotary embedding.
        k_cache, v_cache: [B, G, T, D], G key-value heads, H a multiple of G (grouped queries);
            positions from ``length`` on are never used and may hold anything.
        length: live positions, in 1..T: an int, or an integer tensor of one element or [B] that
            stays on its device (its values are not checked, which would need a synchronisation).

    Returns:
        [B, H, D], dtype of ``q``.

    Raises:
        TypeError: not floating tensors, two dtypes, or a length that is no integer.
        ValueError: shapes that do not fit each other, two devices, or an int length outside 1..T.

    Source: the KV-cached attention of LlamaGen's generator.
    """
    name = "decode_attention"
    check_tensor(name, "q", q, "[B, H, D]", 3)
    check_tensor(name, "k_cache", k_cache, "[B, G, T, D]", 4)
    check_tensor(name, "v_cache", v_cache, "[B, G, T, D]", 4)
    check_same(name, q=q, k_cache=k_cache, v_cache=v_cache)
    B, H, D = q.shape
    heads, capacity = k_cache.shape[1], k_cache.shape[2]
    check_shape(name, "k_cache", k_cache, (B, heads, capacity, D))
    check_shape(name, "v_cache", v_cache, (B, heads, capacity, D))
    if heads == 0 or H % heads:
        raise ValueError(
            f"{name}: query heads must be a multiple of key-value heads, got {H} and {heads}"
        )
    check_position(name, "length", length, 1, capacity + 1, (1, B), q=q)
    return _op(q, k_cache, v_cache, length)
