"""The kernels of `nearest_code` that score all codes: `_insert`, `_prepare`, `_screen`.

The screen distinguishes only groups of GROUP consecutive codes, one group per column of the matrix
unit's tile: place (span, t, column) of ``packed`` holds code (span * TILE + column) * GROUP + t. A
running maximum over the GROUP tiles of a span then gives, column by column, the maximum of a group:
one instruction covers several scores, and threads exchange nothing.

The scores that matter are not negative. As integers, positive floats keep their order, and the
hardware has a maximum of three integers. A maximum starts at 0; a row whose largest score is not
clearly above 0 is left to float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Powers of two that keep float16 values out of the subnormal range and within 65504 (README.md,
# "Scales"): for queries with float32 scores, for queries with float16 scores, and for codes.
Z_SCALE = tl.constexpr(64.0)
Z_SCALE_HALF = tl.constexpr(1.0)
E_SCALE = tl.constexpr(256.0)
# As in F.normalize: shorter codes are divided by this instead of by their length.
EPS = tl.constexpr(1e-12)
# Threads that share a row of the matrix unit's tile; each holds every fourth pair of columns.
LANES = tl.constexpr(4)
# Indices into ``facts``: the largest residuals of a code after one and two roundings to float16, as
# bits, and K minus the index of the first code that is not finite.
RESIDUAL = tl.constexpr(0)
RESIDUAL_2 = tl.constexpr(1)
BROKEN = tl.constexpr(2)


@triton.jit
def _hash(e, o_dim, m_dim):
    """Hash of every row of e [n, C], equal for equal rows: int32 [n]."""
    word = e.to(tl.int32, bitcast=True)
    word = (word ^ (word >> 15)) * (2 * o_dim[None, :] + 0x2C1B3C6D)
    total = tl.sum(tl.where(m_dim, word ^ (word >> 12), 0), axis=1)
    total = (total ^ ((total >> 16) & 0xFFFF)) * 0x297A2D39
    return total ^ ((total >> 15) & 0x1FFFF)


@triton.jit
def _rows_of(codebook, code, K, D: tl.constexpr, C: tl.constexpr):
    """Rows of the codebook as float32 [n, C]; past the end, the last row again."""
    o_dim = tl.arange(0, C)
    m_dim = (o_dim < D)[None, :]
    source = tl.minimum(code, K - 1)
    p_e = codebook + source.to(tl.int64)[:, None] * D + o_dim[None, :]
    # The addition turns -0 into 0, so that equal rows have equal bits.
    return tl.load(p_e, mask=m_dim, other=0.0).to(tl.float32) + 0.0


@triton.jit
def _insert(
    codebook, first, K, SLOTS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr
):
    """Store K minus the lowest code of each hash."""
    o_dim = tl.arange(0, C)
    code = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = _rows_of(codebook, code, K, D, C)
    slot = _hash(e, o_dim, (o_dim < D)[None, :]) & (SLOTS - 1)
    tl.atomic_max(first + slot, K - code, mask=code < K)


@triton.jit
def _prepare(
    codebook, first, packed, rest, exact, inverse, alive, facts, K,
    D: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, TILE_AGAIN: tl.constexpr,
    GROUP: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Prepare one group of codes: two float16 halves for the screens, float32 for the rescans.

    Codes past the end and, with SLOTS, codes equal to a lower one are zeros in the screens.
    """
    i_group = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, C)
    m_dim = (o_dim < D)[None, :]
    o_code = tl.arange(0, GROUP)
    code = i_group * GROUP + o_code
    e = _rows_of(codebook, code, K, D, C)
    broken = tl.max(tl.where(tl.abs(e) < float("inf"), 0, 1), axis=1) > 0
    dead = code >= K
    if SLOTS > 0:
        slot = _hash(e, o_dim, m_dim) & (SLOTS - 1)
        lowest = K - tl.load(first + slot)
        same = tl.max(tl.where(_rows_of(codebook, lowest, K, D, C) == e, 0, 1), axis=1) == 0
        dead |= same & (lowest < code)
    e = tl.where(broken[:, None], 0.0, e)
    wide = e.to(tl.float64)
    inv = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), EPS)
    unit = wide * inv[:, None]
    half = (unit.to(tl.float32) * E_SCALE).to(tl.float16)
    left = unit - half.to(tl.float64) / E_SCALE
    low = (left.to(tl.float32) * E_SCALE).to(tl.float16)
    left_2 = left - low.to(tl.float64) / E_SCALE
    # Rounded up, because the conversion from float64 to float32 may round down.
    once = tl.sqrt(tl.max(tl.sum(left * left, axis=1))).to(tl.float32) * (1.0 + 2.0**-20)
    twice = tl.sqrt(tl.max(tl.sum(left_2 * left_2, axis=1))).to(tl.float32) * (1.0 + 2.0**-20)
    # As bits, which have the same order as the positive numbers.
    tl.atomic_max(facts + RESIDUAL, once.to(tl.int32, bitcast=True).to(tl.int64))
    tl.atomic_max(facts + RESIDUAL_2, twice.to(tl.int32, bitcast=True).to(tl.int64))
    tl.atomic_max(facts + BROKEN, tl.max(tl.where(broken & (code < K), K - code, 0)))
    tl.store(alive + i_group, tl.max(tl.where(dead, 0, 1)).to(tl.int8))
    place = ((i_group // TILE) * GROUP + o_code) * TILE + i_group % TILE
    p_packed = place[:, None] * C + o_dim[None, :]
    half = tl.where(dead[:, None], 0.0, half)
    tl.store(packed + p_packed, half)
    place = ((i_group // TILE_AGAIN) * GROUP + o_code) * TILE_AGAIN + i_group % TILE_AGAIN
    p_rest = rest + place[:, None] * C + o_dim[None, :]
    size = tl.num_programs(0).to(tl.int64) * (GROUP * C)
    # Store the upper halves twice: a tile that two products read is not copied asynchronously.
    tl.store(p_rest, half)
    tl.store(p_rest + size, half)
    tl.store(p_rest + 2 * size, tl.where(dead[:, None], 0.0, low))
    p_exact = exact + (i_group * D + o_dim[None, :]) * GROUP + o_code[:, None]
    tl.store(p_exact, e, mask=m_dim & (o_code >= 0)[:, None])
    tl.store(inverse + code, inv)


@triton.jit
def _bits(scores, WIDE: tl.constexpr, ASM: tl.constexpr):
    """Scores [R, T] as integers of the same order: [R, T], or two per int32, [R, T / 2]."""
    R: tl.constexpr = scores.shape[0]
    T: tl.constexpr = scores.shape[1]
    if WIDE:
        word = scores.to(tl.int32, bitcast=True)
    elif ASM:
        # The pair is already in one register; this only tells the compiler.
        both = tl.inline_asm_elementwise(
            "mov.b32 $0, $2; mov.b32 $1, $2;", "=r,=r,r", [scores],
            dtype=tl.int32, is_pure=True, pack=2,
        )  # fmt: skip
        word, _ = tl.split(tl.reshape(both, (R, T // 2, 2)))
    else:
        low, high = tl.split(tl.reshape(scores, (R, T // 2, 2)))
        low = low.to(tl.int16, bitcast=True).to(tl.int32)
        high = high.to(tl.int16, bitcast=True).to(tl.int32)
        word = (high << 16) | (low & 0xFFFF)
    return word


@triton.jit
def _max3(m, a, b, WIDE: tl.constexpr, ASM: tl.constexpr):
    """Maximum of three 32-bit integers or pairs of 16-bit ones; one VIMNMX3 from sm_90 on."""
    if ASM and WIDE:
        m = tl.inline_asm_elementwise(
            "{ .reg .b32 t; max.s32 t, $1, $2; max.s32 $0, t, $3; }", "=r,r,r,r", [m, a, b],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    elif ASM:
        m = tl.inline_asm_elementwise(
            "{ .reg .b32 t; max.s16x2 t, $1, $2; max.s16x2 $0, t, $3; }", "=r,r,r,r", [m, a, b],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    elif WIDE:
        m = tl.maximum(tl.maximum(m, a), b)
    else:
        high = tl.maximum(tl.maximum(m >> 16, a >> 16), b >> 16)
        low = tl.maximum(tl.maximum((m << 16) >> 16, (a << 16) >> 16), (b << 16) >> 16)
        m = (high << 16) | (low & 0xFFFF)
    return m


@triton.jit
def _product(a, b, WIDE: tl.constexpr, ASM: tl.constexpr):
    """Scores of one product; without ASM, float16 scores are rounded once, at the end."""
    if WIDE:
        score = tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32)
    elif ASM:
        score = tl.dot(a, b, input_precision="ieee", out_dtype=tl.float16)
    else:
        score = tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32).to(tl.float16)
    return score


@triton.jit
def _split_product(high, low, p_e, size):
    """Scores from both halves of rows and codes, without the product of the two lower halves."""
    score = tl.dot(low, tl.load(p_e), input_precision="ieee", out_dtype=tl.float32)
    e = tl.load(p_e + size)
    e_low = tl.load(p_e + 2 * size)
    score = tl.dot(high, e_low, score, input_precision="ieee", out_dtype=tl.float32)
    return tl.dot(high, e, score, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def _reduce(m, WIDE: tl.constexpr, EXACT: tl.constexpr):
    """For each lane, the largest key, the second largest, and the first's column: [R, LANES].

    A key is the bits of a score. Unless EXACT, it also contains the column in its last bits, which
    saves a search: README.md, "Keys".
    """
    R: tl.constexpr = m.shape[0]
    W: tl.constexpr = m.shape[1]
    if WIDE:
        column = tl.arange(0, W)[None, :]
        keys = m if EXACT else (m & (-W)) | column
        keys = tl.reshape(keys, (R, W // 8, LANES, 2))
        top = tl.max(tl.max(keys, axis=3), axis=1)
        is_top = keys == top[:, None, :, None]
        if EXACT:
            columns = tl.reshape(column + tl.zeros((R, W), tl.int32), (R, W // 8, LANES, 2))
            at = tl.min(tl.min(tl.where(is_top, columns, W), axis=3), axis=1)
            is_top = columns == at[:, None, :, None]
        else:
            at = top & (W - 1)
        other = tl.where(is_top, 0, keys)
        other = tl.max(tl.max(other, axis=3), axis=1)
    else:
        column = 2 * tl.arange(0, W)[None, :]
        low = tl.reshape(((m & 0xFFFF) << 8) | column, (R, W // 4, LANES))
        high = tl.reshape(((m >> 16) << 8) | (column + 1), (R, W // 4, LANES))
        more, less = tl.maximum(low, high), tl.minimum(low, high)
        top = tl.max(more, axis=1)
        at = top & 0xFF
        other = tl.max(tl.where(more == top[:, None, :], less, more), axis=1)
    return top, other, at


@triton.jit
def _value(key, TILE: tl.constexpr, WIDE: tl.constexpr, EXACT: tl.constexpr):
    """The score of a key in float32, truncated if WIDE and not EXACT; 0 if there is none."""
    if WIDE:
        value = (key if EXACT else key & (-TILE)).to(tl.float32, bitcast=True)
    else:
        value = (key >> 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _query(z, row, m_row, SCALE: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """Scale rows by a power of two to a largest value between 1 and 4; split them into float16.

    Returns the halves in units of 1 / SCALE, the length of the scaled row, and the lengths of the
    residuals after one and after two roundings.
    """
    o_dim = tl.arange(0, C)
    p_z = z + row[:, None] * D + o_dim[None, :]
    value = tl.load(p_z, mask=m_row[:, None] & (o_dim < D)[None, :], other=0.0).to(tl.float32)
    bits = tl.max(tl.abs(value), axis=1).to(tl.int32, bitcast=True)
    value *= (tl.maximum(254 - (bits >> 23), 1) << 23).to(tl.float32, bitcast=True)[:, None]
    high = (value * SCALE).to(tl.float16)
    left = value - high.to(tl.float32) / SCALE
    low = (left * SCALE).to(tl.float16)
    left_2 = left - low.to(tl.float32) / SCALE
    size = tl.sqrt(tl.sum(value * value, axis=1))
    once = tl.sqrt(tl.sum(left * left, axis=1))
    return high, low, size, once, tl.sqrt(tl.sum(left_2 * left_2, axis=1))


# Not specialised: the last round of a call may have any number of rows.
@triton.jit(do_not_specialize=["N"])
def _screen(
    z, packed, facts, listed, count, best, second, where, slack, N, steps, per_split, bound,
    D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, SUB: tl.constexpr,
    SPLITS: tl.constexpr, WIDE: tl.constexpr, AGAIN: tl.constexpr, ASM: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Find the best and second best group of each lane, for some rows and one split of the codes.

    A step is SUB tiles, a part of a span. AGAIN: for the listed rows, with products of both halves.
    """
    SCALE: tl.constexpr = Z_SCALE if WIDE else Z_SCALE_HALF
    WORDS: tl.constexpr = TILE if WIDE else TILE // 2
    rows = N
    if AGAIN:
        rows = tl.load(count).to(tl.int32)
    lane = tl.arange(0, LANES)
    o_dim = tl.arange(0, C)
    place = tl.arange(0, TILE)[None, :] * C + o_dim[:, None]
    stride, width = tl.full((), TILE * C, tl.int64), tl.full((), ROWS, tl.int64)
    # One index for rows and splits; there may be more listed rows than programs, or none.
    for item in range(tl.program_id(0), tl.cdiv(rows, ROWS) * SPLITS, tl.num_programs(0)):
        i_split = item % SPLITS
        at = (item // SPLITS) * width + tl.arange(0, ROWS)
        m_row = at < rows
        row = at
        if AGAIN:
            row = tl.load(listed + at, mask=m_row, other=0)
        high, low, size, once, twice = _query(z, row, m_row, SCALE, D, C)
        b_best = tl.zeros((ROWS, LANES), tl.int32)
        b_second = tl.zeros((ROWS, LANES), tl.int32)
        b_where = tl.zeros((ROWS, LANES), tl.int32)
        first = i_split * per_split
        for step in range(first, tl.minimum(first + per_split, steps)):
            m = tl.zeros((ROWS, WORDS), tl.int32)
            for t in tl.range(0, SUB, 2, num_stages=STAGES):
                p_e = packed + place + (step * SUB + t) * stride
                if AGAIN:
                    a = _split_product(high, low, p_e, steps * (SUB * stride))
                    b = _split_product(high, low, p_e + stride, steps * (SUB * stride))
                else:
                    a = _product(high, tl.load(p_e), WIDE, ASM)
                    b = _product(high, tl.load(p_e + stride), WIDE, ASM)
                m = _max3(m, _bits(a, WIDE, ASM), _bits(b, WIDE, ASM), WIDE, ASM)
            top, other, column = _reduce(m, WIDE, AGAIN)
            b_second = tl.maximum(tl.maximum(b_second, other), tl.minimum(b_best, top))
            b_where = tl.where(top > b_best, step * TILE + column, b_where)
            b_best = tl.maximum(b_best, top)
        p_out = (at[:, None] * SPLITS + i_split) * LANES + lane[None, :]
        tl.store(best + p_out, _value(b_best, TILE, WIDE, AGAIN), mask=m_row[:, None])
        tl.store(second + p_out, _value(b_second, TILE, WIDE, AGAIN), mask=m_row[:, None])
        tl.store(where + p_out, b_where, mask=m_row[:, None])
        # README.md, "Error bound": twice the largest possible error of a score, in score units.
        residual = tl.load(facts + RESIDUAL).to(tl.int32).to(tl.float32, bitcast=True)
        if AGAIN:
            residual_2 = tl.load(facts + RESIDUAL_2).to(tl.int32).to(tl.float32, bitcast=True)
            whole = size + once + twice
            error = (once + twice) * (residual + residual_2) + twice + whole * residual_2
            error += 3 * C * 2.0**-22 * (whole + once) * (1.0 + 3.0 * residual)
        else:
            whole = size + once
            error = (once + C * 2.0**-22 * whole) * (1.0 + residual) + size * residual
            if not WIDE:
                # The sum is rounded or truncated to float16 after every 16 columns.
                error += (C // 16) * 2.0**-10 * whole * (1.0 + residual) + 2.0**-30
        m_first = m_row & (i_split == 0)
        tl.store(slack + at, error * (2.002 * bound) * SCALE * E_SCALE, mask=m_first)
