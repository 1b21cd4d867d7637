"""Linear layers of 1 to 4 rows, without the matrix unit: latency is all that counts.

A program has the rows of weights of TILE outputs (two rows for each pair of q, k and v, and for a
gated output), CHUNK columns of them in registers at a time. It asks for the first before it waits
for the kernel ahead, and for x after that. Products and sums are in float32, element by element as
long as there are columns; only then do threads exchange anything, all sums of a row of x at once.
Of one warp they need no barrier for it. Many small programs with few registers wait for memory
together, and those of the next kernel find room beside them.

The sums of a row are added up in the same order whatever other rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import _let_next_begin, _wait_for_last
from .epilogue import _finish, _others, _rows_of

MAX_ROWS = 4
# Columns that a program holds at once at most: more would not fit into registers.
CHUNK = 4096


@triton.jit
def _add_two(a, b, x, y):
    return a + x, b + y


@triton.jit
def _add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _sums(a, b, squares, PAIRS: tl.constexpr, SQUARES: tl.constexpr):
    """Sums of ``a`` and ``b`` [outputs, columns], and of ``squares`` [columns]: each [outputs].

    In one exchange between threads, for each costs two barriers where there are several warps.
    """
    if SQUARES:
        squares = tl.broadcast_to(squares[None, :], a.shape)
        if PAIRS:
            a, b, squares = tl.reduce((a, b, squares), 1, _add_three)
            return a, b, squares
        else:
            a, squares = tl.reduce((a, squares), 1, _add_two)
            return a, a, squares
    else:
        tl.static_assert(not PAIRS, "what has pairs has a norm")
        a = tl.sum(a, axis=1)
        return a, a, a


@triton.jit(do_not_specialize=["rows"])
def _vector(
    x, norm, w, out, rotary, position, k_cache, v_cache, rows, N, eps,
    EPILOGUE: tl.constexpr, K: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, EARLY: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Outputs [P, TILE] of RMSNorm(x) [rows, K], or of x where ``norm`` is None; see `_finish`."""
    PAIRS: tl.constexpr = EPILOGUE < 2
    SQUARES: tl.constexpr = norm is not None
    if OVERLAP and EARLY:
        _let_next_begin()
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    m_n = o_n < N
    o_r = tl.arange(0, P)
    o_k = tl.arange(0, CHUNK)
    first, second = _rows_of(o_n, N, EPILOGUE)
    p_a = w + first[:, None] * K + o_k[None, :]
    p_b = w + second[:, None] * K + o_k[None, :]
    m_k = o_k < K
    mask = m_n[:, None] & m_k[None, :]
    # Weights are read once; they need not push activations out of the L2 cache. Nothing writes
    # them, so they need not wait for the kernel ahead either.
    a = tl.load(p_a, mask=mask, other=0, eviction_policy="evict_first")
    b = a
    if PAIRS:
        b = tl.load(p_b, mask=mask, other=0, eviction_policy="evict_first")
    if SQUARES:
        gain = tl.load(norm + o_k, mask=m_k, other=0.0, eviction_policy="evict_first")
    if OVERLAP:
        _wait_for_last()
        if not EARLY:
            _let_next_begin()
    at, one, two = _others(o_n, m_n, o_r, rows, N, out, rotary, position, EPILOGUE, H, T, D)
    # Of each row of x one after the other: products with a, with b, and squares.
    totals = ()
    for start in tl.static_range(0, K, CHUNK):
        if start > 0:
            m_k = start + o_k < K
            mask = m_n[:, None] & m_k[None, :]
            a = tl.load(p_a + start, mask=mask, other=0, eviction_policy="evict_first")
            if PAIRS:
                b = tl.load(p_b + start, mask=mask, other=0, eviction_policy="evict_first")
            if SQUARES:
                gain = tl.load(norm + start + o_k, mask=m_k, other=0.0)
        values = ()
        for r in tl.static_range(P):
            values += (tl.load(x + r * K + start + o_k, mask=m_k & (r < rows), other=0.0),)
        before, totals = totals, ()
        for r in tl.static_range(P):
            value = values[r].to(tl.float32)
            squares = value
            if SQUARES:
                squares = value * value
                value *= gain.to(tl.float32)
            by_a = a.to(tl.float32) * value[None, :]
            by_b = by_a
            if PAIRS:
                by_b = b.to(tl.float32) * value[None, :]
            if start > 0:
                by_a += before[3 * r]
                by_b += before[3 * r + 1]
                squares += before[3 * r + 2]
            totals += (by_a, by_b, squares)
    sum_a = tl.zeros((TILE, P), tl.float32)
    sum_b = tl.zeros((TILE, P), tl.float32)
    for r in tl.static_range(P):
        of_a, of_b, of_squares = _sums(*totals[3 * r : 3 * r + 3], PAIRS, SQUARES)
        if SQUARES:
            scale = tl.rsqrt(of_squares / K + eps)
            of_a *= scale
            of_b *= scale
        sum_a = tl.where((o_r == r)[None, :], of_a[:, None], sum_a)
        sum_b = tl.where((o_r == r)[None, :], of_b[:, None], sum_b)
    _finish(
        sum_a, sum_b, at, one, two, o_n, m_n, o_r, rows, N, out, k_cache, v_cache, EPILOGUE, H, T, D
    )
