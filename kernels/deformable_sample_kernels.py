"""The kernels of `deformable_sample`, which launches them: two forward, two backward.

    _gather        loads the four pixels of every sample; any size, any type
    _dense         writes the samples of its queries in a tile of 8 x 8 pixels as a matrix
                   [queries, 64] and multiplies it with the tile's values
    _grad_samples  gradients of offsets and logits, gathered as in _gather
    _grad_value    gradient of the values of a few tiles: the transposed matrix times the gradients
                   of all queries, each tile by one program in one order, so without atomics

Their common arguments are those of `ops.deformable_sample`, contiguous, in any of float32, float16
and bfloat16. ``words`` holds a level as one number each, see `word`; ``POINT_ROWS`` is 1 or B. C,
WIDE, ALL and LEVELS are D, P, L * P and L rounded up to powers of two. Arithmetic is float32,
coordinates too, whatever the type; only the matrix of the dense forms is rounded to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Pixels of a tile along each side: three tiles make a row of a 24 x 24 map.
SIDE = tl.constexpr(8)
# A location further out than any map; also stands for one that is not finite.
FAR = tl.constexpr(-1e6)
LARGEST_SIDE = 2**15 - 1


def word(height: int, width: int) -> int:
    """A level in one odd number, for which Triton never compiles another variant of a kernel."""
    return height << 16 | width << 1 | 1


@triton.jit
def _size(word):
    return word >> 16, (word & 0xFFFF) >> 1


@triton.jit
def _level(words, level, L: tl.constexpr):
    """Height, width and first pixel of a level that only the loop knows."""
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
    """Which image, head and queries a program of a pass over queries has."""
    blocks = tl.cdiv(Q, ROWS)
    i_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch = i_head // H
    q = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    head = (batch * Q + q) * H + i_head % H
    point = (tl.where(POINT_ROWS > 1, batch, 0) * Q + q) * L
    return q < Q, head, point, (batch * S * H + i_head % H) * D


@triton.jit
def _log_sum(logits, head, m_q, N: tl.constexpr, WIDE: tl.constexpr):
    """Logarithm of the softmax's denominator [ROWS]."""
    o = tl.arange(0, WIDE)
    mask = m_q[:, None] & (o < N)[None, :]
    logit = tl.load(logits + head[:, None] * N + o[None, :], mask=mask, other=float("-inf"))
    logit = tl.where(m_q[:, None], logit.to(tl.float32), 0.0)
    top = tl.max(logit, axis=1)
    return top + tl.log(tl.sum(tl.exp(logit - top[:, None]), axis=1))


@triton.jit
def _samples(
    points, point, offsets, logits, head, lse, m_q, level, height, width,
    L: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Samples of one level [ROWS, WIDE]: where they are, x and y in pixels, and attention.

    Pixel centres are whole numbers. Samples past the last are far away and count nothing.
    """
    o = tl.arange(0, WIDE)[None, :]
    mask = m_q[:, None] & (o < P)
    at = head[:, None] * (L * P) + level * P + o
    p_point = points + (point + level) * 2
    centre_x = tl.load(p_point, mask=m_q, other=0.0).to(tl.float32)[:, None]
    centre_y = tl.load(p_point + 1, mask=m_q, other=0.0).to(tl.float32)[:, None]
    x = centre_x * width + tl.load(offsets + at * 2, mask=mask, other=0.0).to(tl.float32) - 0.5
    y = centre_y * height + tl.load(offsets + at * 2 + 1, mask=mask, other=0.0).to(tl.float32) - 0.5
    logit = tl.load(logits + at, mask=mask, other=float("-inf")).to(tl.float32)
    # Also where they are not finite.
    x = tl.where(mask & (tl.abs(x) < 1e6), x, FAR)
    y = tl.where(mask & (tl.abs(y) < 1e6), y, FAR)
    return at, x, y, tl.exp(logit - lse[:, None])


@triton.jit
def _corner(
    p_v, start, height, width, left, top, stride, m_d, DX: tl.constexpr, DY: tl.constexpr
):  # fmt: skip
    """Values [N, C] of the pixels (left + DX, top + DY) [N], zero outside the level."""
    column, row = left.to(tl.int32) + DX, top.to(tl.int32) + DY
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    # 32 bits, within one image; the pointer has the rest.
    pixel = (start + row * width + column) * stride
    return tl.load(p_v + pixel[:, None], mask=inside[:, None] & m_d, other=0.0).to(tl.float32)


@triton.jit
def _column(tile, i: tl.constexpr, WIDE: tl.constexpr):
    """Column ``i`` of [ROWS, WIDE]."""
    return tl.sum(tl.where((tl.arange(0, WIDE) == i)[None, :], tile, 0.0), axis=1)


@triton.jit
def _tent(place, first, o):
    """Bilinear share of the pixels ``first + o`` in a sample at ``place``."""
    return tl.maximum(1.0 - tl.abs(place - (first + o).to(tl.float32)), 0.0)


@triton.jit
def _gather(
    value, points, offsets, logits, out, words, S, Q, H, POINT_ROWS,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    ALL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some queries of one image and head, all samples of a level at a time."""
    m_q, head, point, first = _queries(Q, H, POINT_ROWS, S, L, D, ROWS)
    o_d = tl.arange(0, C)[None, :]
    m_d = o_d < D
    lse = _log_sum(logits, head, m_q, L * P, ALL)
    p_v = value + first + o_d
    acc = tl.zeros((ROWS * WIDE, C), tl.float32)
    for level in range(L):
        height, width, start = _level(words, level, L)
        _, x, y, a = _samples(
            points, point, offsets, logits, head, lse, m_q, level, height, width, L, P, WIDE
        )
        x, y = tl.reshape(x, (ROWS * WIDE,)), tl.reshape(y, (ROWS * WIDE,))
        a = tl.reshape(a, (ROWS * WIDE,))
        left, top = tl.floor(x), tl.floor(y)
        by_x, by_y = x - left, y - top
        for dy in tl.static_range(2):
            share = a * (by_y if dy else 1.0 - by_y)
            for dx in tl.static_range(2):
                w = share * (by_x if dx else 1.0 - by_x)
                v = _corner(p_v, start, height, width, left, top, H * D, m_d, dx, dy)
                acc += w[:, None] * v
    acc = tl.sum(tl.reshape(acc, (ROWS, WIDE, C)), axis=1)
    tl.store(out + head[:, None] * D + o_d, acc, mask=m_q[:, None] & m_d)


@triton.jit
def _dense(
    value, points, offsets, logits, out, words, S, Q, H, POINT_ROWS,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    ALL: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some queries of one image and head, against every tile of every level."""
    m_q, head, point, first = _queries(Q, H, POINT_ROWS, S, L, D, ROWS)
    o_d = tl.arange(0, C)[None, :]
    m_d = o_d < D
    o_side = tl.arange(0, SIDE)[None, :]
    o_pixel = tl.arange(0, SIDE * SIDE)
    lse = _log_sum(logits, head, m_q, L * P, ALL)
    p_v = value + first + o_d
    acc = tl.zeros((ROWS, C), tl.float32)
    for level in range(L):
        height, width, start = _level(words, level, L)
        _, x, y, a = _samples(
            points, point, offsets, logits, head, lse, m_q, level, height, width, L, P, WIDE
        )
        xs, ys, shares = (), (), ()
        for i in tl.static_range(P):
            xs = xs + (_column(x, i, WIDE),)
            ys = ys + (_column(y, i, WIDE),)
            shares = shares + (_column(a, i, WIDE),)
        along = tl.cdiv(width, SIDE)
        for i_tile in range(tl.cdiv(height, SIDE) * along):
            top, left = (i_tile // along) * SIDE, (i_tile % along) * SIDE
            row, column = top + o_pixel // SIDE, left + o_pixel % SIDE
            pixel = (start + row * width + column) * (H * D)
            m_v = ((row < height) & (column < width))[:, None] & m_d
            v = tl.load(p_v + pixel[:, None], mask=m_v, other=0.0)
            share = tl.zeros((ROWS, SIDE, SIDE), tl.float32)
            for i in tl.static_range(P):
                by_row = shares[i][:, None] * _tent(ys[i][:, None], top, o_side)
                by_column = _tent(xs[i][:, None], left, o_side)
                share += by_row[:, :, None] * by_column[:, None, :]
            share = tl.reshape(share, (ROWS, SIDE * SIDE)).to(v.dtype)
            acc = tl.dot(share, v, acc, input_precision="ieee")
    tl.store(out + head[:, None] * D + o_d, acc, mask=m_q[:, None] & m_d)


@triton.jit
def _grad_samples(
    grad, value, points, offsets, logits, grad_offsets, grad_logits, log_sum, words,
    S, Q, H, POINT_ROWS,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    ALL: tl.constexpr, LEVELS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of offsets and logits of some queries, and the logarithms of their softmax sums."""
    m_q, head, point, first = _queries(Q, H, POINT_ROWS, S, L, D, ROWS)
    o_d = tl.arange(0, C)[None, :]
    m_d = o_d < D
    lse = _log_sum(logits, head, m_q, L * P, ALL)
    tl.store(log_sum + head, lse, mask=m_q)
    g = tl.load(grad + head[:, None] * D + o_d, mask=m_q[:, None] & m_d, other=0.0)
    g = tl.broadcast_to(g.to(tl.float32)[:, None, :], (ROWS, WIDE, C))
    g = tl.reshape(g, (ROWS * WIDE, C))
    p_v = value + first + o_d
    m_sample = m_q[:, None] & (tl.arange(0, WIDE) < P)[None, :]
    o_level = tl.arange(0, LEVELS)[None, :, None]
    attention = tl.zeros((ROWS, LEVELS, WIDE), tl.float32)
    products = tl.zeros((ROWS, LEVELS, WIDE), tl.float32)
    for level in range(L):
        height, width, start = _level(words, level, L)
        at, x, y, a = _samples(
            points, point, offsets, logits, head, lse, m_q, level, height, width, L, P, WIDE
        )
        x, y = tl.reshape(x, (ROWS * WIDE,)), tl.reshape(y, (ROWS * WIDE,))
        # The derivative at a whole number is the one of the pair of pixels that begins there.
        left, top = tl.floor(x), tl.floor(y)
        by_x, by_y = x - left, y - top
        here = (p_v, start, height, width, left, top, H * D, m_d)
        upper_left = tl.sum(g * _corner(*here, 0, 0), axis=1)
        upper_right = tl.sum(g * _corner(*here, 1, 0), axis=1)
        lower_left = tl.sum(g * _corner(*here, 0, 1), axis=1)
        lower_right = tl.sum(g * _corner(*here, 1, 1), axis=1)
        along_x = (1.0 - by_y) * (upper_right - upper_left) + by_y * (lower_right - lower_left)
        along_y = (1.0 - by_x) * (lower_left - upper_left) + by_x * (lower_right - upper_right)
        product = (1.0 - by_y) * ((1.0 - by_x) * upper_left + by_x * upper_right) + by_y * (
            (1.0 - by_x) * lower_left + by_x * lower_right
        )
        along_x = a * tl.reshape(along_x, (ROWS, WIDE))
        along_y = a * tl.reshape(along_y, (ROWS, WIDE))
        tl.store(grad_offsets + at * 2, along_x, mask=m_sample)
        tl.store(grad_offsets + at * 2 + 1, along_y, mask=m_sample)
        product = tl.reshape(product, (ROWS, 1, WIDE))
        attention = tl.where(o_level == level, a[:, None, :], attention)
        products = tl.where(o_level == level, product, products)
    # Of a softmax: a_i (g_i - sum_j a_j g_j).
    mean = tl.sum(tl.sum(attention * products, axis=2), axis=1)
    o_point = tl.arange(0, WIDE)[None, None, :]
    p_out = grad_logits + head[:, None, None] * (L * P) + o_level * P + o_point
    m_out = m_q[:, None, None] & (o_level < L) & (o_point < P)
    tl.store(p_out, attention * (products - mean[:, None, None]), mask=m_out)


@triton.jit
def _grad_value(
    grad, points, offsets, logits, log_sum, grad_value, words, S, Q, H, POINT_ROWS, strips,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, C: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradient of a strip of tiles, side by side, of one level, image and head."""
    i_head = (tl.program_id(0) // strips).to(tl.int64)
    batch = i_head // H
    i_strip = tl.program_id(0) % strips
    level, start, height, width, before = 0, 0, 1, 1, 0
    strips_passed, pixels_passed = 0, 0
    for i in tl.static_range(L):
        # The last level that begins at or before this strip.
        rows, columns = _size(words[i])
        here = i_strip >= strips_passed
        level = tl.where(here, i, level)
        start, before = tl.where(here, pixels_passed, start), tl.where(here, strips_passed, before)
        height, width = tl.where(here, rows, height), tl.where(here, columns, width)
        strips_passed += tl.cdiv(rows, SIDE) * tl.cdiv(columns, SIDE * TILES)
        pixels_passed += rows * columns
    along = tl.cdiv(width, SIDE * TILES)
    top = ((i_strip - before) // along) * SIDE
    left = ((i_strip - before) % along) * (SIDE * TILES)

    o_d = tl.arange(0, C)[None, :]
    m_d = o_d < D
    o_side = tl.arange(0, SIDE)[:, None]
    zeros = tl.zeros((SIDE * SIDE, C), tl.float32)
    accs = (zeros,)
    for i_tile in tl.static_range(1, TILES):
        accs = accs[:i_tile] + (zeros,)
    for i_q in range(0, Q, ROWS):
        q = i_q + tl.arange(0, ROWS)
        m_q = q < Q
        head = (batch * Q + q) * H + i_head % H
        point = (tl.where(POINT_ROWS > 1, batch, 0) * Q + q) * L
        lse = tl.load(log_sum + head, mask=m_q, other=0.0)
        _, x, y, a = _samples(
            points, point, offsets, logits, head, lse, m_q, level, height, width, L, P, WIDE
        )
        near_x = (x > left - 1) & (x < left + SIDE * TILES)
        near_y = (y > top - 1) & (y < top + SIDE)
        # On a large map most queries look elsewhere.
        if tl.max(tl.max(tl.where(near_x & near_y, 1, 0), axis=1), axis=0) > 0:
            g = tl.load(grad + head[:, None] * D + o_d, mask=m_q[:, None] & m_d, other=0.0)
            by_rows, xs = (), ()
            for i in tl.static_range(P):
                by_row = _tent(_column(y, i, WIDE)[None, :], top, o_side)
                by_rows = by_rows + (_column(a, i, WIDE)[None, :] * by_row,)
                xs = xs + (_column(x, i, WIDE)[None, :],)
            sums = ()
            for i_tile in tl.static_range(TILES):
                share = tl.zeros((SIDE, SIDE, ROWS), tl.float32)
                for i in tl.static_range(P):
                    by_column = _tent(xs[i], left + i_tile * SIDE, o_side)
                    share += by_rows[i][:, None, :] * by_column[None, :, :]
                share = tl.reshape(share, (SIDE * SIDE, ROWS)).to(g.dtype)
                sums = sums + (tl.dot(share, g, accs[i_tile], input_precision="ieee"),)
            accs = sums
    o_pixel = tl.arange(0, SIDE * SIDE)
    for i_tile in tl.static_range(TILES):
        row, column = top + o_pixel // SIDE, left + i_tile * SIDE + o_pixel % SIDE
        pixel = (batch * S + start + row * width + column) * H + i_head % H
        m_pixel = ((row < height) & (column < width))[:, None] & m_d
        tl.store(grad_value + pixel[:, None] * D + o_d, accs[i_tile], mask=m_pixel)
