"""Epilogues of a step's linear layers, shared by the kernels that compute the sums."""

from __future__ import annotations

import triton
import triton.language as tl

# What is done with the sums. Each output of the first two comes from two rows of weights. PLAIN
# stores them.
QKV, GATED, ADDED, PLAIN, GELU = 0, 1, 2, 3, 4


@triton.jit
def _rows_of(o_n, N, EPILOGUE: tl.constexpr):
    """The first and the second weight row of each output in ``o_n``.

    For q, k and v an output is a pair of adjacent rows. For a gate, all first rows precede all
    second rows.
    """
    row = o_n.to(tl.int64)
    if EPILOGUE == 0:
        return 2 * row, 2 * row + 1
    return row, row + N


@triton.jit
def _others(
    o_n, m_n, o_r, rows, N, out, bias, gate, gate_stride, rotary, position,
    EPILOGUE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Load what `_finish` needs besides the sums, before the sums are computed, to hide latency.

    For q, k and v: the position, cosines and sines. For an addition: the biases, the old values and
    the gates. Else: the biases. Zeros stand for what there is not.
    """
    plus = 0.0
    if bias is not None:
        tl.static_assert(EPILOGUE >= 2, "outputs of two rows have no bias")
        plus = tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    if EPILOGUE == 0:
        at = tl.load(position).to(tl.int64)
        half: tl.constexpr = D // 2
        turns = m_n & (o_n // (H * half) < 2)
        p_table = rotary + (at * half + o_n % half) * 2
        cos = tl.load(p_table, mask=turns, other=1.0)
        sin = tl.load(p_table + 1, mask=turns, other=0.0)
        return at, cos[:, None], sin[:, None]
    elif EPILOGUE == 2:
        # In place: no other program has these elements.
        p_out = out + o_r.to(tl.int64)[None, :] * N + o_n[:, None]
        mask = m_n[:, None] & (o_r < rows)[None, :]
        old = tl.load(p_out, mask=mask, other=0.0).to(tl.float32)
        if gate is not None:
            p_gate = gate + o_r.to(tl.int64)[None, :] * gate_stride + o_n[:, None]
            return plus, old, tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)
        else:
            return plus, old, old
    else:
        return plus, 0.0, 0.0


@triton.jit
def _finish(
    a, b, at, one, two, o_n, m_n, o_r, rows, N, out, bias, gate, k_cache, v_cache,
    EPILOGUE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Apply the epilogue to the sums ``a`` and ``b`` [outputs, rows] of ``o_n`` and ``o_r``; store.

    ``at``, the position or the biases, ``one`` and ``two`` are the results of `_others`.
    """
    dtype = out.dtype.element_ty
    row = o_r.to(tl.int64)[None, :]
    mask = m_n[:, None] & (o_r < rows)[None, :]
    if EPILOGUE == 0:
        half: tl.constexpr = D // 2
        width: tl.constexpr = H * half
        part = o_n // width
        head = (o_n % width) // half
        pair = o_n % half
        first = a * one - b * two
        second = b * one + a * two
        p_q = out + row * (2 * width) + 2 * (o_n % width)[:, None]
        m_q = mask & (part == 0)[:, None]
        tl.store(p_q, first.to(dtype), mask=m_q)
        tl.store(p_q + 1, second.to(dtype), mask=m_q)
        place = ((row * H + head[:, None]) * T + at) * D + 2 * pair[:, None]
        m_k = mask & (part == 1)[:, None]
        tl.store(k_cache + place, first.to(dtype), mask=m_k)
        tl.store(k_cache + place + 1, second.to(dtype), mask=m_k)
        m_v = mask & (part == 2)[:, None]
        tl.store(v_cache + place, a.to(dtype), mask=m_v)
        tl.store(v_cache + place + 1, b.to(dtype), mask=m_v)
    else:
        if bias is not None:
            a += at
        if EPILOGUE == 1:
            a = a / (1.0 + tl.exp(-a)) * b
        elif EPILOGUE == 2:
            if gate is not None:
                a *= two
            a += one
        elif EPILOGUE == 4:
            a = 0.5 * a * (1.0 + tl.erf(a * 0.7071067811865476))
        tl.store(out + row * N + o_n[:, None], a.to(dtype), mask=mask)
