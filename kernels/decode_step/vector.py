"""Linear layers of 1 to 4 rows, without the matrix unit: latency is all that counts.

A program has TILE rows of the weights (twice that where an output is made of two) with all their K
columns in registers, up to CHUNK of them; it asks for them before it waits for the kernel ahead,
and for x after that. Products and sums are in float32. Many small programs with few registers wait
for memory together, and those of the next kernel find room beside them.

The sums of a row are added up in the same order whatever other rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import _let_next_begin, _wait_for_last
from .epilogue import _finish, _pairs, _row_of

MAX_ROWS = 4
# Columns that a program holds at once: more would not fit into registers.
CHUNK = 4096


@triton.jit(do_not_specialize=["rows", "position"])
def _vector(
    x, norm, w_a, w_b, scale_a, scale_b, out, rotary, position, k_cache, v_cache, rows, N, eps,
    KIND: tl.constexpr, K: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ON_DEVICE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Outputs [P, TILE] of RMSNorm(x) [rows, K], or of x where ``norm`` is None; see `_finish`."""
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    m_n = o_n < N
    o_r = tl.arange(0, P)
    o_k = tl.arange(0, CHUNK)
    rows_each: tl.constexpr = 2 * TILE if _pairs(KIND) else TILE
    # Pairs alternate, so that a sum of two stands in neighbouring elements.
    if _pairs(KIND):
        o_w = tl.program_id(0) * TILE + tl.arange(0, rows_each) // 2
        first, second = _row_of(o_w, KIND)
        odd = tl.arange(0, rows_each) % 2 == 1
        p_w = tl.where(odd, w_b + second * K, w_a + first * K)
    else:
        o_w = o_n
        p_w = w_a + o_w.to(tl.int64) * K
    m_w = (o_w < N)[:, None]
    p_w = p_w[:, None] + o_k[None, :]
    # Weights are read once; they need not push activations out of the L2 cache.
    w = tl.load(p_w, mask=m_w & (o_k < K)[None, :], other=0, eviction_policy="evict_first")
    if OVERLAP:
        _wait_for_last()
        _let_next_begin()
    total = tl.zeros((rows_each, P), tl.float32)
    squares = tl.zeros((P,), tl.float32)
    for start in tl.static_range(0, K, CHUNK):
        m_k = start + o_k < K
        if start > 0:
            w = tl.load(
                p_w + start, mask=m_w & m_k[None, :], other=0, eviction_policy="evict_first"
            )
        wide = w.to(tl.float32)
        if norm is not None:
            gain = tl.load(norm + start + o_k, mask=m_k, other=0.0).to(tl.float32)
        for r in tl.static_range(P):
            value = tl.load(x + r * K + start + o_k, mask=m_k & (r < rows), other=0.0)
            value = value.to(tl.float32)
            if norm is not None:
                squares += tl.where(o_r == r, tl.sum(value * value, axis=0), 0.0)
                value *= gain
            part = tl.sum(wide * value[None, :], axis=1)
            total += tl.where((o_r == r)[None, :], part[:, None], 0.0)
    if norm is not None:
        total *= tl.rsqrt(squares / K + eps)[None, :]
    if _pairs(KIND):
        a, b = tl.split(tl.trans(tl.reshape(total, (TILE, 2, P)), 0, 2, 1))
        if scale_a is not None:
            first, second = _row_of(o_n, KIND)
            a *= tl.load(scale_a + first, mask=m_n, other=0.0)[:, None]
            b *= tl.load(scale_b + second, mask=m_n, other=0.0)[:, None]
    else:
        a = total
        b = total
        if scale_a is not None:
            a *= tl.load(scale_a + o_n, mask=m_n, other=0.0)[:, None]
    _finish(
        a, b, o_n, m_n, o_r, rows, N, out, rotary, position, k_cache, v_cache,
        KIND, H, T, D, ON_DEVICE,
    )  # fmt: skip
