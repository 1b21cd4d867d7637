"""Linear layers for 1 to 4 rows, without the matrix unit, where only latency matters.

A program holds the weight rows of TILE outputs (two rows for each pair of q, k and v, and for a
gated output), CHUNK columns of them in registers at a time. It requests the first chunk before it
waits for the previous kernel, and x after that. Products accumulate in float32, element by element
over the columns. Threads exchange data only at the end, all sums of a row of x in one reduction; a
single warp needs no barrier for it. Many small programs with few registers wait for memory at the
same time, and programs of the next kernel fit next to them.

The sums of a row are accumulated in the same order regardless of the other rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import _let_next_begin, _wait_for_last
from .epilogue import _finish, _others, _rows_of

MAX_ROWS = 4
# Maximum number of columns that a program holds at once: more would not fit into registers.
CHUNK = 4096


@triton.jit
def _add_two(a, b, x, y):
    return a + x, b + y


@triton.jit
def _add_three(a, b, c, x, y, z):
    return a + x, b + y, c + z


@triton.jit
def _sums(a, b, squares, PAIRS: tl.constexpr, SQUARES: tl.constexpr):
    """Sum ``a``, ``b`` [outputs, columns] and ``squares`` [columns] over columns: [outputs] each.

    All in one exchange between threads, because each exchange costs two barriers with several
    warps.
    """
    if SQUARES:
        squares = tl.broadcast_to(squares[None, :], a.shape)
        if PAIRS:
            a, b, squares = tl.reduce((a, b, squares), 1, _add_three)
            return a, b, squares
        else:
            a, squares = tl.reduce((a, squares), 1, _add_two)
            return a, a, squares
    elif PAIRS:
        a, b = tl.reduce((a, b), 1, _add_two)
        return a, b, a
    else:
        a = tl.sum(a, axis=1)
        return a, a, a


@triton.jit(do_not_specialize=["rows"])
def _vector(
    x, norm, w, out, bias, gate, gate_stride, rotary, position, k_cache, v_cache, rows, N, eps,
    EPILOGUE: tl.constexpr, K: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
    CHUNK: tl.constexpr, EARLY: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Outputs [P, TILE] of RMSNorm(x) [rows, K], or of x if ``norm`` is None; see `_finish`."""
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
    # Weights are read once, so they need not evict activations from L2. No kernel writes them, so
    # these loads need not wait for the previous kernel either.
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
    at, one, two = _others(
        o_n, m_n, o_r, rows, N, out, bias, gate, gate_stride, rotary, position, EPILOGUE, H, T, D
    )
    # For each row of x in turn: products with a, products with b, and squares.
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
        sum_a, sum_b, at, one, two, o_n, m_n, o_r, rows, N, out, bias, gate, k_cache, v_cache,
        EPILOGUE, H, T, D,
    )  # fmt: skip
