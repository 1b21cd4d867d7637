"""The backward kernels of `deformable_sample`.

_grad_samples  gradients of offsets and logits, gathered as in the forward kernel
_sort          sorts the samples of each image, head and level by the rows that they touch
_grad_value    gradient of the values of a strip of rows: a matrix of bilinear shares times the
               incoming gradients of the samples that touch the strip, in sorted order
_add_value     the same with atomic additions
"""

from __future__ import annotations

import triton
import triton.language as tl

from .places import _axis, _level, _log_sum, _pair, _queries, _rows, _samples, _size

# Pixels of a tile along a row: three tiles make a row of a 24 x 24 map.
SIDE = tl.constexpr(8)


@triton.jit
def _first(tile, i: tl.constexpr):
    """``tile[i]`` of [4, STEP, ROWS]."""
    return tl.sum(tl.where(tl.arange(0, 4)[:, None, None] == i, tile, 0.0), axis=0)


@triton.jit
def _grad_samples(
    grad, value, points, offsets, logits, grad_offsets, grad_logits, log_sum, lines, words,
    S, Q, H, POINT_ROWS,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ALL: tl.constexpr,
    CHUNKS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    CORNERS: tl.constexpr,
):  # fmt: skip
    """Compute gradients of offsets and logits of some queries, and their log-sum-exp."""
    q, m_q, row, rows, point, first = _queries(Q, H, POINT_ROWS, S, L, D, ROWS)
    points, offsets, logits = (
        points + point * 2,
        offsets + rows * (L * P * 2),
        logits + rows * L * P,
    )
    grad_offsets, grad_logits = grad_offsets + rows * (L * P * 2), grad_logits + rows * L * P
    lines += (tl.program_id(0) // tl.cdiv(Q, ROWS)).to(tl.int64) * Q * (L * P)
    lse = _log_sum(logits, row, m_q, L * P, ALL)
    tl.store(log_sum + rows + row, lse, mask=m_q)
    o_d = tl.arange(0, C)[None, :]
    p_grad = grad + rows * D + (row * D)[:, None] + o_d
    g = tl.load(p_grad, mask=m_q[:, None] & (o_d < D), other=0.0).to(tl.float32)
    o_chunk = tl.arange(0, CHUNKS)[:, None, None]
    o_corner = tl.arange(0, 4)[:, None, None]
    attention = tl.zeros((CHUNKS, STEP, ROWS), tl.float32)
    products = tl.zeros((CHUNKS, STEP, ROWS), tl.float32)
    steps: tl.constexpr = (P + STEP - 1) // STEP
    for i in range(L * steps):
        level = i // steps
        height, width, start = _level(words, level, L)
        at, m_sample, x, y, a = _samples(
            points, offsets, logits, q, row, lse, m_q, level, (i % steps) * STEP,
            height, width, L, P, STEP,
        )  # fmt: skip
        left, right, by_left, by_right = _pair(x, width)
        upper, lower, by_upper, by_lower = _pair(y, height)
        upper, lower = start + upper * width, start + lower * width
        dots = tl.zeros((4, STEP, ROWS), tl.float32)
        for corner in tl.range(0, 4, loop_unroll_factor=CORNERS):
            pixel = tl.where(corner < 2, upper, lower) + tl.where(corner % 2 == 0, left, right)
            v = _rows(value, first, pixel * (H * D), D, C, WORDS)
            dot = tl.sum(g[None, :, :] * v, axis=2)
            dots = tl.where(o_corner == corner, dot[None, :, :], dots)
        # Lines for the lists of `_sort`.
        touches = (x > -1.0) & (x < width) & (y > -1.0) & (y < height)
        line = tl.where(touches, tl.floor(y) + 1.0, -1.0).to(lines.dtype.element_ty)
        o_point = (i % steps) * STEP + tl.arange(0, STEP)[:, None]
        tl.store(lines + level * (Q * P) + (q * P)[None, :] + o_point, line, mask=m_sample)
        # Here a pixel outside must have the value zero, not only a share of zero.
        column, i_row = tl.floor(x).to(tl.int32), tl.floor(y).to(tl.int32)
        m_left, m_right = (column >= 0) & (column < width), (column >= -1) & (column < width - 1)
        m_upper, m_lower = (i_row >= 0) & (i_row < height), (i_row >= -1) & (i_row < height - 1)
        upper_left = tl.where(m_upper & m_left, _first(dots, 0), 0.0)
        upper_right = tl.where(m_upper & m_right, _first(dots, 1), 0.0)
        lower_left = tl.where(m_lower & m_left, _first(dots, 2), 0.0)
        lower_right = tl.where(m_lower & m_right, _first(dots, 3), 0.0)
        # The derivative at a whole number is that of the pixel pair that begins there.
        by_x, by_y = x - tl.floor(x), y - tl.floor(y)
        along_x = (1.0 - by_y) * (upper_right - upper_left) + by_y * (lower_right - lower_left)
        along_y = (1.0 - by_x) * (lower_left - upper_left) + by_x * (lower_right - upper_right)
        product = (1.0 - by_y) * ((1.0 - by_x) * upper_left + by_x * upper_right) + by_y * (
            (1.0 - by_x) * lower_left + by_x * lower_right
        )
        o_xy = tl.arange(0, 2)[None, None, :]
        tl.store(
            grad_offsets + (at * 2)[:, :, None] + o_xy,
            tl.join(a * along_x, a * along_y),
            mask=m_sample[:, :, None] & (o_xy < 2),
        )
        attention = tl.where(o_chunk == i, a[None, :, :], attention)
        products = tl.where(o_chunk == i, product[None, :, :], products)
    # Softmax gradient: a_i (g_i - sum_j a_j g_j).
    mean = tl.sum(tl.sum(attention * products, axis=1), axis=0)
    o_out = (o_chunk % steps) * STEP + tl.arange(0, STEP)[None, :, None]
    p_out = grad_logits + (row * (L * P))[None, None, :] + (o_chunk // steps) * P + o_out
    m_out = m_q[None, None, :] & (o_chunk < L * steps) & (o_out < P)
    tl.store(p_out, attention * (products - mean[None, None, :]), mask=m_out)


@triton.jit
def _numbered(n, h, level, H, L: tl.constexpr, P: tl.constexpr):
    """For the samples ``n`` of a head and level: (query, head) row, sample index, point index."""
    q = n // P
    row = q * H + h
    return row, row * (L * P) + level * P + n % P, q * L + level


@triton.jit
def _last_bin(rows, HEIGHT: tl.constexpr):
    """Number of lists of a level, minus one.

    Every strip has one list for the line that it shares with the previous strip, and one for its
    other lines. The lists of a strip and of the next shared line are thus contiguous.
    """
    return rows // HEIGHT * 2 + tl.minimum(rows % HEIGHT, 1)


@triton.jit
def _bins(lines, n, N, HEIGHT: tl.constexpr):
    """The lists of the samples ``n``, -1 for none."""
    line = tl.load(lines + n, mask=n < N, other=-1).to(tl.int32)
    return tl.where(line < 0, -1, _last_bin(line, HEIGHT))


@triton.jit
def _one(at):
    """A one in counter ``at`` of four 16-bit counters in an int64; 0 if ``at`` is not 0 to 3."""
    return tl.where((at >= 0) & (at < 4), tl.full(at.shape, 1, tl.int64) << (16 * at), 0)


@triton.jit
def _counters(four, at):
    return ((four >> (16 * at)) & 0xFFFF).to(tl.int32)


@triton.jit
def _put(order, at, n, run, o):
    """Append the samples ``n`` of lists ``at`` to four lists, which continue at ``run``."""
    one = _one(at)
    place = _counters(tl.cumsum(one, axis=0), tl.where(one == 0, 0, at)) - 1
    for k in tl.static_range(4):
        place += tl.where(at == k, tl.sum(tl.where(o == k, run, 0), axis=0), 0)
    tl.store(order + place, n, mask=one != 0)


@triton.jit
def _sort(
    lines, order, starts, words, N, groups, all_bins,
    L: tl.constexpr, HEIGHT: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Write some lists of the samples of one image, head and level.

    ``lines`` [B, H, L, N]: 1 + the upper row that a sample touches, -1 if it touches none.
    ``order`` [B, H, L, N] receives the sample indices, ordered by list, then by index. ``starts``
    [B, H, all_bins] receives the start of each list, and the end of the last list of a level.
    WHOLE: one chunk holds all samples.
    """
    i_head = (tl.program_id(0) // groups).to(tl.int64)
    i_group = tl.program_id(0) % groups
    level, last, before, first_bin, passed, bins_passed = 0, 1, 0, 0, 0, 0
    for i in tl.static_range(L):
        # Select the last level that begins at or before this group.
        rows, columns = _size(words[i])
        here, bins = i_group >= passed, _last_bin(rows, HEIGHT)
        level, last = tl.where(here, i, level), tl.where(here, bins, last)
        before, first_bin = tl.where(here, passed, before), tl.where(here, bins_passed, first_bin)
        passed += tl.cdiv(bins + 2, GROUP)
        bins_passed += bins + 2
    lines += (i_head * L + level) * N
    order += (i_head * L + level) * N
    starts += i_head * all_bins + first_bin
    top = (i_group - before) * GROUP
    o_n, o = tl.arange(0, CHUNK), tl.arange(0, 4)
    every = _bins(lines, o_n, N, HEIGHT)
    begin = tl.sum(tl.where((every >= 0) & (every < top), 1, 0), axis=0)
    if not WHOLE:
        for first in range(CHUNK, N, CHUNK):
            at = _bins(lines, first + o_n, N, HEIGHT)
            begin += tl.sum(tl.where((at >= 0) & (at < top), 1, 0), axis=0)
    for i in range(top, tl.minimum(top + GROUP, last + 2), 4):
        counts = _counters(tl.sum(_one(every - i), axis=0), o)
        if not WHOLE:
            for first in range(CHUNK, N, CHUNK):
                one = _one(_bins(lines, first + o_n, N, HEIGHT) - i)
                counts += _counters(tl.sum(one, axis=0), o)
        run = begin + tl.cumsum(counts, axis=0) - counts
        tl.store(starts + i + o, run, mask=i + o < last + 2)
        begin += tl.sum(counts, axis=0)
        _put(order, every - i, o_n, run, o)
        if not WHOLE:
            run += _counters(tl.sum(_one(every - i), axis=0), o)
            for first in range(CHUNK, N, CHUNK):
                at = _bins(lines, first + o_n, N, HEIGHT) - i
                _put(order, at, first + o_n, run, o)
                run += _counters(tl.sum(_one(at), axis=0), o)


@triton.jit
def _tent(place, first, o):
    """Bilinear share of the pixels ``first + o`` in a sample at ``place``, along one axis."""
    return tl.maximum(1.0 - tl.abs(place - (first + o).to(tl.float32)), 0.0)


@triton.jit
def _grad_value(
    grad, points, offsets, logits, log_sum, order, starts, grad_value, words,
    S, Q, H, POINT_ROWS, strips, all_bins,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    HEIGHT: tl.constexpr, TILES: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a strip of adjacent tiles [HEIGHT, SIDE] of one level, image and head."""
    i_head = (tl.program_id(0) // strips).to(tl.int64)
    batch, h = i_head // H, (i_head % H).to(tl.int32)
    i_strip = tl.program_id(0) % strips
    level, start, height, width, before, first_bin = 0, 0, 1, 1, 0, 0
    strips_passed, pixels_passed, bins_passed = 0, 0, 0
    for i in tl.static_range(L):
        # Select the last level that begins at or before this strip.
        rows, columns = _size(words[i])
        here = i_strip >= strips_passed
        level, first_bin = tl.where(here, i, level), tl.where(here, bins_passed, first_bin)
        start, before = tl.where(here, pixels_passed, start), tl.where(here, strips_passed, before)
        height, width = tl.where(here, rows, height), tl.where(here, columns, width)
        strips_passed += tl.cdiv(rows, HEIGHT) * tl.cdiv(columns, SIDE * TILES)
        pixels_passed += rows * columns
        bins_passed += _last_bin(rows, HEIGHT) + 2
    along = tl.cdiv(width, SIDE * TILES)
    top = ((i_strip - before) // along) * HEIGHT
    left = ((i_strip - before) % along) * (SIDE * TILES)

    points += tl.where(POINT_ROWS > 1, batch, 0) * Q * L * 2
    offsets += batch * Q * H * (L * P * 2)
    logits += batch * Q * H * (L * P)
    log_sum += batch * Q * H
    grad += batch * Q * H * D
    order += (i_head * L + level) * Q * P
    # Only samples whose upper row is in the strip or directly above it touch the strip.
    p_start = starts + i_head * all_bins + first_bin
    i_bin = top // HEIGHT * 2
    begin = tl.load(p_start + i_bin)
    end = tl.load(p_start + tl.minimum(i_bin + 3, _last_bin(height, HEIGHT) + 1))
    o_d = tl.arange(0, C)[None, :]
    o_row, o_side = tl.arange(0, HEIGHT)[:, None], tl.arange(0, SIDE)[:, None]
    zeros = tl.zeros((HEIGHT * SIDE, C), tl.float32)
    accs = (zeros,)
    for i_tile in tl.static_range(1, TILES):
        accs = accs[:i_tile] + (zeros,)
    for i in range(begin, end, STEP):
        o = i + tl.arange(0, STEP)
        mask = o < end
        n = tl.load(order + o, mask=mask, other=0).to(tl.int32)
        row, at, point = _numbered(n, h, level, H, L, P)
        x = _axis(points, point, offsets, at, mask, width, 0)
        y = _axis(points, point, offsets, at, mask, height, 1)
        logit = tl.load(logits + at, mask=mask, other=float("-inf")).to(tl.float32)
        a = tl.exp(logit - tl.load(log_sum + row, mask=mask, other=0.0))
        p_grad = grad + (row * D)[:, None] + o_d
        g = tl.load(p_grad, mask=mask[:, None] & (o_d < D), other=0.0)
        by_row = a[None, :] * _tent(y[None, :], top, o_row)
        sums = ()
        for i_tile in tl.static_range(TILES):
            by_column = _tent(x[None, :], left + i_tile * SIDE, o_side)
            share = by_row[:, None, :] * by_column[None, :, :]
            share = tl.reshape(share, (HEIGHT * SIDE, STEP)).to(g.dtype)
            sums = sums + (tl.dot(share, g, accs[i_tile], input_precision=PRECISION),)
        accs = sums
    o_pixel = tl.arange(0, HEIGHT * SIDE)
    for i_tile in tl.static_range(TILES):
        i_row, column = top + o_pixel // SIDE, left + i_tile * SIDE + o_pixel % SIDE
        pixel = (batch * S + start + i_row * width + column) * H + h
        m_pixel = ((i_row < height) & (column < width))[:, None] & (o_d < D)
        tl.store(grad_value + pixel[:, None] * D + o_d, accs[i_tile], mask=m_pixel)


@triton.jit
def _add_value(
    grad, points, offsets, logits, log_sum, sums, words, S, Q, H, POINT_ROWS,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Atomically add the shares of some queries to the float32 ``sums`` [B, S, H, D]."""
    q, m_q, row, rows, point, first = _queries(Q, H, POINT_ROWS, S, L, D, ROWS)
    points, offsets, logits = (
        points + point * 2,
        offsets + rows * (L * P * 2),
        logits + rows * L * P,
    )
    lse = tl.load(log_sum + rows + row, mask=m_q, other=0.0)
    o_d = tl.arange(0, C)[None, :]
    p_grad = grad + rows * D + (row * D)[:, None] + o_d
    g = tl.load(p_grad, mask=m_q[:, None] & (o_d < D), other=0.0).to(tl.float32)
    steps: tl.constexpr = (P + STEP - 1) // STEP
    for i in range(L * steps):
        level = i // steps
        height, width, start = _level(words, level, L)
        _, _, x, y, a = _samples(
            points, offsets, logits, q, row, lse, m_q, level, (i % steps) * STEP,
            height, width, L, P, STEP,
        )  # fmt: skip
        left, right, by_left, by_right = _pair(x, width)
        upper, lower, by_upper, by_lower = _pair(y, height)
        by_upper, by_lower = a * by_upper, a * by_lower
        upper, lower = start + upper * width, start + lower * width
        for corner in range(4):
            is_upper, is_left = corner < 2, corner % 2 == 0
            w = tl.where(is_upper, by_upper, by_lower) * tl.where(is_left, by_left, by_right)
            pixel = tl.where(is_upper, upper, lower) + tl.where(is_left, left, right)
            p_sum = sums + first + (pixel * (H * D))[:, :, None] + o_d[None, :, :]
            mask = (w > 0.0)[:, :, None] & (o_d < D)[None, :, :]
            tl.atomic_add(p_sum, w[:, :, None] * g[None, :, :], mask=mask, sem="relaxed")
