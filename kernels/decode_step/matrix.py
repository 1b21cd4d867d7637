"""Linear layers for 5 to 64 rows on the matrix unit, with x normalised beforehand.

A program computes TILE outputs and iterates over K in pieces: either SLICES of them side by side,
each in its own warp, with the sums combined once at the end; or, with one slice, all warps on one
piece. Weights and x are both loaded by asynchronous copies and are contiguous along K, as the
matrix unit reads them: nothing is transposed, and the swizzled rows, copied 16 bytes at a time, are
read from shared memory without bank conflicts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..launch import _let_next_begin, _wait_for_last
from .epilogue import _finish, _others, _rows_of

MAX_ROWS = 64
# Up to this many rows `FEW` applies, whose default splits K among the warps, because rows are few;
# above, `SOME` applies, whose default has all warps share x.
FEW_ROWS = 16
# Bytes of weights that a program prefetches into L2 before it waits for the previous kernel. The
# programs resident on an H200 request at most 17 MB in total, which takes longer than the wait and
# fits into L2.
FETCH = tl.constexpr(65536)


@triton.jit
def _fetch(pointers):
    """Prefetch cache lines into L2 without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _fetch_rows(w, row, m_n, K: tl.constexpr, TILE: tl.constexpr, BYTES: tl.constexpr):
    """Prefetch the first BYTES of TILE rows of w [N, K] in total, by 128-byte lines."""
    line: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
    width: tl.constexpr = 8 * line
    for k in range(0, min(K, BYTES // TILE * line // 128), width):
        o = k + line * tl.arange(0, 8)
        # Past the end of a row, use its last element again.
        at = row[:, None] * K + tl.minimum(o, K - 1)[None, :]
        _fetch(w + tl.where(m_n[:, None], at, 0))


@triton.jit(do_not_specialize=["rows"])
def _matrix(
    x, w, out, bias, gate, gate_stride, rotary, position, k_cache, v_cache, rows, N,
    EPILOGUE: tl.constexpr, K: tl.constexpr, P: tl.constexpr, TILE: tl.constexpr,
    DEPTH: tl.constexpr, SLICES: tl.constexpr, STAGES: tl.constexpr, H: tl.constexpr,
    T: tl.constexpr, D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Outputs [P, TILE] of x [rows, K]; see `_finish`."""
    PAIRS: tl.constexpr = EPILOGUE < 2
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    m_n = o_n < N
    o_r = tl.arange(0, P)
    first, second = _rows_of(o_n, N, EPILOGUE)
    # Tiles [SLICES, rows, DEPTH] of matrices with rows of length K; with one slice, [rows, DEPTH].
    if SLICES > 1:
        o_k = (tl.arange(0, SLICES) * DEPTH)[:, None, None] + tl.arange(0, DEPTH)[None, None, :]
        p_a = w + first[None, :, None] * K + o_k
        p_b = w + second[None, :, None] * K + o_k
        p_x = x + o_r.to(tl.int64)[None, :, None] * K + o_k
        m_w, m_x = m_n[None, :, None], (o_r < rows)[None, :, None]
        a = tl.zeros((SLICES, TILE, P), tl.float32)
    else:
        o_k = tl.arange(0, DEPTH)[None, :]
        p_a = w + first[:, None] * K + o_k
        p_b = w + second[:, None] * K + o_k
        p_x = x + o_r.to(tl.int64)[:, None] * K + o_k
        m_w, m_x = m_n[:, None], (o_r < rows)[:, None]
        a = tl.zeros((TILE, P), tl.float32)
    b = a
    if OVERLAP:
        each: tl.constexpr = FETCH // 2 if PAIRS else FETCH
        _fetch_rows(w, first, m_n, K, TILE, each)
        if PAIRS:
            _fetch_rows(w, second, m_n, K, TILE, each)
        _wait_for_last()
        _let_next_begin()
    at, one, two = _others(
        o_n, m_n, o_r, rows, N, out, bias, gate, gate_stride, rotary, position, EPILOGUE, H, T, D
    )
    for k in tl.range(0, K, SLICES * DEPTH, num_stages=STAGES):
        m_k = k + o_k < K
        value = tl.load(p_x + k, mask=m_x & m_k, other=0)
        value = tl.permute(value, (0, 2, 1)) if SLICES > 1 else tl.trans(value)
        piece = tl.load(p_a + k, mask=m_w & m_k, other=0)
        a = tl.dot(piece, value, a, input_precision="ieee")
        if PAIRS:
            piece = tl.load(p_b + k, mask=m_w & m_k, other=0)
            b = tl.dot(piece, value, b, input_precision="ieee")
    if SLICES > 1:
        a = tl.sum(a, axis=0)
        b = tl.sum(b, axis=0)
    _finish(
        a, b, at, one, two, o_n, m_n, o_r, rows, N, out, bias, gate, k_cache, v_cache,
        EPILOGUE, H, T, D,
    )  # fmt: skip
