"""Linear layers of 1 to 4 rows, without the matrix unit: latency is all that counts.

A program has the rows of weights of TILE outputs (two rows for each pair of q, k and v, and for a
gated output), up to CHUNK columns of them in registers at a time. It asks for the first before it
waits for the kernel ahead, and for x after that. Products and sums are in float32. Many small
programs with few registers wait for memory together, and those of the next kernel find room beside
them.

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
    x, norm, w_a, w_b, out, rotary, position, k_cache, v_cache, rows, N, eps,
    KIND: tl.constexpr, K: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ON_DEVICE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Outputs [P, TILE] of RMSNorm(x) [rows, K], or of x where ``norm`` is None; see `_finish`."""
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    m_n = o_n < N
    o_r = tl.arange(0, P)
    o_k = tl.arange(0, CHUNK)
    first, second = _row_of(o_n, KIND)
    p_a = w_a + first[:, None] * K + o_k[None, :]
    p_b = w_b + second[:, None] * K + o_k[None, :]
    mask = m_n[:, None] & (o_k < K)[None, :]
    # Weights are read once; they need not push activations out of the L2 cache. Nothing writes
    # them, so they need not wait for the kernel ahead either.
    a = tl.load(p_a, mask=mask, other=0, eviction_policy="evict_first")
    b = a
    if _pairs(KIND):
        b = tl.load(p_b, mask=mask, other=0, eviction_policy="evict_first")
    if OVERLAP:
        _wait_for_last()
        _let_next_begin()
    sum_a = tl.zeros((TILE, P), tl.float32)
    sum_b = tl.zeros((TILE, P), tl.float32)
    squares = tl.zeros((P,), tl.float32)
    for start in tl.static_range(0, K, CHUNK):
        m_k = start + o_k < K
        if start > 0:
            mask = m_n[:, None] & m_k[None, :]
            a = tl.load(p_a + start, mask=mask, other=0, eviction_policy="evict_first")
            if _pairs(KIND):
                b = tl.load(p_b + start, mask=mask, other=0, eviction_policy="evict_first")
        if norm is not None:
            gain = tl.load(norm + start + o_k, mask=m_k, other=0.0).to(tl.float32)
        for r in tl.static_range(P):
            value = tl.load(x + r * K + start + o_k, mask=m_k & (r < rows), other=0.0)
            value = value.to(tl.float32)
            if norm is not None:
                squares += tl.where(o_r == r, tl.sum(value * value, axis=0), 0.0)
                value *= gain
            part = tl.sum(a.to(tl.float32) * value[None, :], axis=1)
            sum_a += tl.where((o_r == r)[None, :], part[:, None], 0.0)
            if _pairs(KIND):
                part = tl.sum(b.to(tl.float32) * value[None, :], axis=1)
                sum_b += tl.where((o_r == r)[None, :], part[:, None], 0.0)
    if norm is not None:
        scale = tl.rsqrt(squares / K + eps)[None, :]
        sum_a *= scale
        sum_b *= scale
    _finish(
        sum_a, sum_b, o_n, m_n, o_r, rows, N, out, rotary, position, k_cache, v_cache,
        KIND, H, T, D, ON_DEVICE,
    )  # fmt: skip
