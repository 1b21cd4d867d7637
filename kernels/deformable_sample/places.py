"""Helpers shared by the kernels of `deformable_sample`: levels, queries and sample locations."""

from __future__ import annotations

import triton
import triton.language as tl

# A location farther out than any map; also replaces locations that are not finite.
FAR = tl.constexpr(-1e6)
LARGEST_SIDE = 2**15 - 1


def word(height: int, width: int) -> int:
    """Pack a level into one odd number, so that Triton never specialises a kernel on it."""
    return height << 16 | width << 1 | 1


@triton.jit
def _size(word):
    return word >> 16, (word & 0xFFFF) >> 1


@triton.jit
def _level(words, level, L: tl.constexpr):
    """Height, width and first pixel of a level, selected at run time."""
    height, width, start, passed = 0, 0, 0, 0
    for i in tl.static_range(L):
        rows, columns = _size(words[i])
        height = tl.where(level == i, rows, height)
        width = tl.where(level == i, columns, width)
        start = tl.where(level == i, passed, start)
        passed += rows * columns
    return height, width, start


@triton.jit
def _queries(Q, H, POINT_ROWS, S, L: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """The image, head and queries of a program in a pass over queries.

    Returns: queries [ROWS], a mask of those that exist, and their (query, head) indices within the
    image; and as 64-bit offsets the image's first (query, head), reference point and value.
    """
    blocks = tl.cdiv(Q, ROWS)
    i_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, h = i_head // H, (i_head % H).to(tl.int32)
    q = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    point = tl.where(POINT_ROWS > 1, batch, 0) * Q * L
    return q, q < Q, q * H + h, batch * Q * H, point, (batch * S * H + h) * D


@triton.jit
def _log_sum(logits, row, m_q, N: tl.constexpr, ALL: tl.constexpr):
    """Log-sum-exp of the softmax [ROWS]."""
    o = tl.arange(0, ALL)
    mask = m_q[:, None] & (o < N)[None, :]
    logit = tl.load(logits + (row * N)[:, None] + o[None, :], mask=mask, other=float("-inf"))
    logit = tl.where(m_q[:, None], logit.to(tl.float32), 0.0)
    top = tl.max(logit, axis=1)
    return top + tl.log(tl.sum(tl.exp(logit - top[:, None]), axis=1))


@triton.jit
def _axis(points, point, offsets, at, mask, size, XY: tl.constexpr):
    """Locations along one axis in pixels, with pixel centres at whole numbers; FAR if masked."""
    centre = tl.load(points + point * 2 + XY, mask=mask, other=0.0).to(tl.float32)
    offset = tl.load(offsets + at * 2 + XY, mask=mask, other=0.0).to(tl.float32)
    # Add the small numbers first, then one multiply-add: only one rounding at the map's magnitude.
    place = centre * size + (offset - 0.5)
    # FAR also replaces locations that are not finite.
    return tl.where(mask & (tl.abs(place) < 1e6), place, FAR)


@triton.jit
def _samples(
    points, offsets, logits, q, row, lse, m_q, level, first, height, width,
    L: tl.constexpr, P: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Points of one level from ``first`` on [STEP, ROWS]: index, mask, x, y, attention weight.

    Queries are the last dimension, so the samples of a query are in the registers of one thread.
    """
    o = first + tl.arange(0, STEP)[:, None]
    mask = m_q[None, :] & (o < P)
    at = (row * (L * P))[None, :] + level * P + o
    point = (q * L + level)[None, :]
    x = _axis(points, point, offsets, at, mask, width, 0)
    y = _axis(points, point, offsets, at, mask, height, 1)
    logit = tl.load(logits + at, mask=mask, other=float("-inf")).to(tl.float32)
    return at, mask, x, y, tl.exp(logit - lse[None, :])


@triton.jit
def _pair(place, size):
    """The two pixels around a location along one axis: indices inside the level, and shares.

    A pixel outside gets a share of zero and the index of the nearest pixel inside. The sample reads
    that pixel anyway or, if no pixel is inside, gives it no weight. So loads need no mask.
    """
    below = tl.floor(place)
    part, first = place - below, below.to(tl.int32)
    by_first = tl.where((first >= 0) & (first < size), 1.0 - part, 0.0)
    by_second = tl.where((first >= -1) & (first < size - 1), part, 0.0)
    last = size - 1
    second = tl.minimum(tl.maximum(first + 1, 0), last)
    return tl.minimum(tl.maximum(first, 0), last), second, by_first, by_second


@triton.jit
def _rows(value, first, offset, D: tl.constexpr, C: tl.constexpr, WORDS: tl.constexpr):
    """Load the rows ``first + offset`` [STEP, ROWS], with 32-bit offsets: float32 [STEP, ROWS, C].

    WORDS: load bfloat16 values two at a time; each is the upper half of a float32. Rows are loaded
    as a matrix, so that threads lie along C, then along queries, for every compiler version.
    """
    flat = tl.reshape(offset, (offset.numel,))[:, None]
    # The largest power of two that divides D; Triton before 3.8 loses it in the reshape.
    even: tl.constexpr = D & -D
    if WORDS:
        o_d = tl.arange(0, C // 2)[None, :]
        p_v = value.to(tl.pointer_type(tl.int32)) + first // 2 + o_d
        p_v += tl.multiple_of(flat // 2, (1, even // 2))
        if D == C:
            word = tl.load(p_v)
        else:
            word = tl.load(p_v, mask=o_d < D // 2, other=0)
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
        v = tl.join(low, high)
    else:
        o_d = tl.arange(0, C)[None, :]
        p_v = value + first + o_d + tl.multiple_of(flat, (1, even))
        if D == C:
            v = tl.load(p_v).to(tl.float32)
        else:
            v = tl.load(p_v, mask=o_d < D, other=0.0).to(tl.float32)
    return tl.reshape(v, (offset.shape[0], offset.shape[1], C))
