"""The first half of a decoding step's attention: norm, projection, rotary, cache."""

from __future__ import annotations

from torch import Tensor

from ..reference import qkv_rotary as reference
from ..switch import Op
from .checks import (
    check_eps,
    check_position,
    check_same,
    check_shape,
    check_tensor,
    check_weights,
)

_op = Op("qkv_rotary", reference.qkv_rotary)


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
    """Query of one new position; its key and value go into the cache, in place.

    ``q, k, v = RMSNorm(x) @ qkv_weight.T``, each H heads of D; then q and k are rotated in
    interleaved pairs by the table's row. For inference: there is no backward pass.

    Args:
        x: [B, C], the hidden state of the new position.
        norm_weight: [C].
        qkv_weight: [3 * H * D, C], rows of q, then k, then v; or int8 that stands for
            ``scale[:, None] * weight``.
        rotary: [T', D / 2, 2] float32, cosine and sine of every position.
        k_cache, v_cache: [B, H, T, D]; position ``position`` of both is overwritten.
        position: in 0..min(T, T') - 1: an int, or an integer tensor of one element that stays on
            its device (its value is not checked, which would need a synchronisation).
        scale: [3 * H * D] float32, of an int8 weight.
        eps: of the norm, at least 0.

    Returns:
        q [B, H, D], dtype of ``x``.

    Raises:
        TypeError: not floating tensors, two dtypes, or a position that is no integer.
        ValueError: shapes that do not fit each other, two devices, or a position outside.

    Source: LlamaGen (arXiv 2406.06525), autoregressive/models/gpt.py.
    """
    name = "qkv_rotary"
    check_tensor(name, "x", x, "[B, C]", 2)
    check_tensor(name, "norm_weight", norm_weight, "[C]", 1)
    check_tensor(name, "rotary", rotary, "[T, D / 2, 2]", 3)
    check_tensor(name, "k_cache", k_cache, "[B, H, T, D]", 4)
    check_tensor(name, "v_cache", v_cache, "[B, H, T, D]", 4)
    check_same(name, x=x, norm_weight=norm_weight, k_cache=k_cache, v_cache=v_cache)
    check_weights(name, x, qkv_weight=(qkv_weight, scale, "[3 * H * D, C]"))
    (B, C), (_, H, T, D) = x.shape, k_cache.shape
    check_shape(name, "norm_weight", norm_weight, (C,))
    check_shape(name, "qkv_weight", qkv_weight, (3 * H * D, C))
    check_shape(name, "k_cache", k_cache, (B, H, T, D))
    check_shape(name, "v_cache", v_cache, (B, H, T, D))
    check_shape(name, "rotary", rotary, (rotary.shape[0], D // 2, 2))
    if D % 2 or rotary.device != x.device:
        raise ValueError(
            f"{name}: rotary must be on {x.device} and D even, got {rotary.device} and D = {D}"
        )
    check_position(name, "position", position, 0, min(T, rotary.shape[0]), (1,), x=x)
    check_eps(name, eps)
    return _op(x, norm_weight, qkv_weight, rotary, k_cache, v_cache, position, scale=scale, eps=eps)
