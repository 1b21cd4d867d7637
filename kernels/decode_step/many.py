"""Small kernels that run between the products of a step.

`_rms_norm` runs before products from 5 rows on, `_modulated` at any number of rows if the block has
a condition. `_append` runs after the product of q, k and v if there are more than 64 rows, if the
cache has 8 bits, or if q and k are normalised or not rotated.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import _let_next_begin, _wait_for_last


@triton.jit
def _rms_norm(x, norm, out, eps, K: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr):
    """Compute one row of x / rms(x) * norm, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, WIDTH)
    m_k = o_k < K
    if OVERLAP:
        _wait_for_last()
        _let_next_begin()
    gain = tl.load(norm + o_k, mask=m_k, other=0.0).to(tl.float32)
    value = tl.load(x + row * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / K + eps)
    tl.store(out + row * K + o_k, (value * gain).to(out.dtype.element_ty), mask=m_k)


@triton.jit
def _modulated(
    x, condition, out, eps, stride, K: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr
):
    """Compute one row of LayerNorm(x) * gain + shift, rounded once.

    A row of ``condition`` is ``stride`` from the next and holds its K shifts, then its K gains.
    """
    row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, WIDTH)
    m_k = o_k < K
    if OVERLAP:
        _wait_for_last()
        _let_next_begin()
    value = tl.load(x + row * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    shift = tl.load(condition + row * stride + o_k, mask=m_k, other=0.0).to(tl.float32)
    gain = tl.load(condition + row * stride + K + o_k, mask=m_k, other=0.0).to(tl.float32)
    value = tl.where(m_k, value - tl.sum(value, axis=0) / K, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / K + eps)
    tl.store(out + row * K + o_k, (value * gain + shift).to(out.dtype.element_ty), mask=m_k)


@triton.jit
def _head_normed(even, odd, weight, bias, eps, m_pair, D: tl.constexpr, HALF: tl.constexpr):
    """LayerNorm of heads [HEADS, HALF], given as even and odd channels."""
    o_pair = 2 * tl.arange(0, HALF)
    mask = m_pair[None, :]
    mean = (tl.sum(even, axis=1) + tl.sum(odd, axis=1)) / D
    even = tl.where(mask, even - mean[:, None], 0.0)
    odd = tl.where(mask, odd - mean[:, None], 0.0)
    square = tl.sum(even * even, axis=1) + tl.sum(odd * odd, axis=1)
    scale = tl.rsqrt(square / D + eps)[:, None]
    w_even = tl.load(weight + o_pair, mask=m_pair, other=0.0).to(tl.float32)
    w_odd = tl.load(weight + o_pair + 1, mask=m_pair, other=0.0).to(tl.float32)
    b_even = tl.load(bias + o_pair, mask=m_pair, other=0.0).to(tl.float32)
    b_odd = tl.load(bias + o_pair + 1, mask=m_pair, other=0.0).to(tl.float32)
    even = even * scale * w_even[None, :] + b_even[None, :]
    return even, odd * scale * w_odd[None, :] + b_odd[None, :]


@triton.jit
def _put(even, odd, cache, scales, place, m, D: tl.constexpr, HALF: tl.constexpr):
    """Store heads [HEADS, HALF] of one position into a cache, in 8 bits if it has ``scales``."""
    o_pair = tl.arange(0, HALF)
    mask = m[:, None] & (o_pair < D // 2)[None, :]
    p = cache + place[:, None] * D + 2 * o_pair[None, :]
    if scales is not None:
        largest = tl.maximum(tl.max(tl.abs(even), axis=1), tl.max(tl.abs(odd), axis=1))
        # For a row of zeros any nonzero scale works.
        scale = tl.where(largest > 0, largest / 127.0, 1.0)
        tl.store(scales + place, scale, mask=m)
        # Adding 1.5 * 2^23 leaves no fractional bits: rounds to nearest, ties to even.
        even = (even / scale[:, None] + 12582912.0) - 12582912.0
        odd = (odd / scale[:, None] + 12582912.0) - 12582912.0
    tl.store(p, even.to(cache.dtype.element_ty), mask=mask)
    tl.store(p + 1, odd.to(cache.dtype.element_ty), mask=mask)


@triton.jit
def _append(
    qkv, rotary, position, out, k_cache, v_cache, k_scale, v_scale,
    q_weight, q_bias, k_weight, k_bias, eps, H: tl.constexpr, T: tl.constexpr,
    D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Finish and append HEADS heads of a row of the products [rows, 3 H D].

    Queries and keys are normalised if their norm has weights, then rotated if there is a table.
    """
    if OVERLAP:
        _wait_for_last()
        _let_next_begin()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    o_pair = tl.arange(0, HALF)
    m_h, m_pair = head < H, o_pair < D // 2
    mask = m_h[:, None] & m_pair[None, :]
    at = tl.load(position).to(tl.int64)
    if rotary is not None:
        p_table = rotary + (at * (D // 2) + o_pair) * 2
        cos = tl.load(p_table, mask=m_pair, other=1.0)[None, :]
        sin = tl.load(p_table + 1, mask=m_pair, other=0.0)[None, :]
    p = qkv + row * (3 * H * D) + head[:, None] * D + 2 * o_pair[None, :]
    place = (row * H + head) * T + at
    # Load everything before the first store: later loads could not be moved ahead of a store.
    halves = ()
    for part in tl.static_range(3):
        halves += (tl.load(p + part * H * D, mask=mask, other=0.0),)
        halves += (tl.load(p + part * H * D + 1, mask=mask, other=0.0),)
    for part in tl.static_range(3):
        even = halves[2 * part].to(tl.float32)
        odd = halves[2 * part + 1].to(tl.float32)
        if part == 2:
            _put(even, odd, v_cache, v_scale, place, m_h, D, HALF)
        else:
            if q_weight is not None:
                if part == 0:
                    even, odd = _head_normed(even, odd, q_weight, q_bias, eps, m_pair, D, HALF)
                else:
                    even, odd = _head_normed(even, odd, k_weight, k_bias, eps, m_pair, D, HALF)
            first, second = even, odd
            if rotary is not None:
                first = even * cos - odd * sin
                second = odd * cos + even * sin
            if part == 1:
                _put(first, second, k_cache, k_scale, place, m_h, D, HALF)
            else:
                _put(first, second, out, None, row * H + head, m_h, D, HALF)
