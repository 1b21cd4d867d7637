"""The forward kernel of `deformable_sample`: load and sum the four pixels of every sample."""

from __future__ import annotations

import triton
import triton.language as tl

from .places import _level, _log_sum, _pair, _queries, _rows, _samples


@triton.jit
def _gather(
    value, points, offsets, logits, out, words, S, Q, H, POINT_ROWS,
    L: tl.constexpr, P: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ALL: tl.constexpr,
    STEP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, CORNERS: tl.constexpr,
):  # fmt: skip
    """Gather some queries of one image and head, up to STEP points of a level at a time."""
    q, m_q, row, rows, point, first = _queries(Q, H, POINT_ROWS, S, L, D, ROWS)
    points, offsets, logits = (
        points + point * 2,
        offsets + rows * (L * P * 2),
        logits + rows * L * P,
    )
    lse = _log_sum(logits, row, m_q, L * P, ALL)
    acc = tl.zeros((ROWS, C), tl.float32)
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
        # A loop unless CORNERS unrolls it: issuing all loads at once takes too many registers.
        for corner in tl.range(0, 4, loop_unroll_factor=CORNERS):
            is_upper, is_left = corner < 2, corner % 2 == 0
            w = tl.where(is_upper, by_upper, by_lower) * tl.where(is_left, by_left, by_right)
            pixel = tl.where(is_upper, upper, lower) + tl.where(is_left, left, right)
            v = _rows(value, first, pixel * (H * D), D, C, WORDS)
            acc += tl.sum(w[:, :, None] * v, axis=0)
    o_d = tl.arange(0, C)[None, :]
    p_out = out + rows * D + (row * D)[:, None] + o_d
    tl.store(p_out, acc, mask=m_q[:, None] & (o_d < D))
