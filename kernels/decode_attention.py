"""Triton `ops.decode_attention`: one query per row and head against the live part of a KV cache.

What it computes: out[b, h] = sum over t < length of softmax(q[b, h] . k[b, g, t] / sqrt(D)) v[b, g,
t] with g = h G / H; softmax in float32, base 2. One launch. A program handles one row and the R
queries of one key-value head:

    _attend_matrix  half precision: matrix unit, queries padded to 16, the cache read once for all
    _attend_pairs   the same for several pairs of row and head, in one loop over their tiles
    _attend_vector  R = 1, for float32, and for half precision and 8 bits if measured to be faster:
                    products and sums; every lane of a tile keeps its own softmax, so threads
                    exchange nothing before the last key

The bits depend on the input and on its memory layout: if heads or rows do not begin at multiples of
16 bytes, loads are narrower, a thread holds different channels, and `_attend_vector`, whose sums
run across threads, adds in another order. The matrix unit always adds in the same order. Neither
depends on the batch.

An 8-bit cache has a scale for each key and each value. The scale of a key multiplies its score and
the scale of a value its weight, so the tiles themselves are integers.

Traffic: 2 B G length D values of the cache, 2 B H D besides. Lower bound on an H200 at 4.3 TB/s,
GPT-L, 64 images guided, bfloat16, length 128: 67 MB, 16 us. decode_attention.md has the
measurements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import _let_next_begin, _wait_for_last, on, overlap
from .registered import registered
from .tuning import Space, dtype_name

# ``values``: keys times padded head dim per tile; the tile of values is as large. ``stages`` - 1
# tiles are in flight while one is processed. ``matrix``: whether half precision uses the matrix
# unit if each key-value head has one query; otherwise products and sums are in float32. Half
# precision on the matrix unit on an H200, 8192 values and 2 stages against 3: GPT-L, 128 rows, 26.7
# and 29.0 us, 2 rows 6.1 both; GPT-3B, 128 rows, 93 and 103 us, and 82 with 4096 values. The
# setting does not depend on the batch, because an image must not depend on it. ``resident``:
# programs per multiprocessor, which go from one pair of row and head to the next; 0 is one program
# per pair. ``resident`` is not measured yet.
_TILES = {"values": (2048, 4096, 8192, 16384), "stages": (1, 2, 3), "warps": (2, 4, 8)}


def _fits(setting) -> bool:
    """Whether a tile's sums fit 64 registers per thread, and the tiles in flight shared memory."""
    return setting.values <= 2048 * setting.warps and setting.values * setting.stages <= 24576


HALF = Space(
    "decode_attention.half",
    {**_TILES, "matrix": (0, 1), "resident": (0, 2, 3, 5)},
    {80: {"values": 8192, "stages": 2, "warps": 4, "matrix": 1, "resident": 0}},
    bits=("values", "warps", "matrix"),
    valid=lambda s: _fits(s) and (s.matrix == 1 or s.resident == 0),
)
FLOAT32 = Space(
    "decode_attention.float32",
    _TILES,
    {80: {"values": 4096, "stages": 3, "warps": 4}},
    bits=("values", "warps"),
    valid=lambda setting: _fits(setting) and setting.values <= 4096,
)
SPACES = HALF, FLOAT32
# With narrow heads, more keys per tile would mostly be dead ones.
MAX_KEYS = 256
# Most queries per program; larger groups use their largest divisor up to this.
MAX_ROWS = 32
# One program per multiprocessor of an H100 or H200; a constant, for the same bits everywhere.
WANTED_PROGRAMS = 132
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _weights(scores, top):
    """2^(scores - top); if top is -inf because no key was seen yet, 0 instead of NaN."""
    return tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def _attend_vector(
    p_q, p_k, p_v, k_scale, v_scale, live,
    D: tl.constexpr, C: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the sum of weights [1] and of weighted values [1, C] over the live positions."""
    o_key = tl.arange(0, TILE)
    o_dim = tl.arange(0, C)
    m_dim = o_dim < D
    b_q = tl.load(p_q + o_dim, mask=m_dim, other=0.0).to(tl.float32)
    p_k += o_key.to(tl.int64)[:, None] * K_ROW + o_dim[None, :]
    p_v += o_key.to(tl.int64)[:, None] * V_ROW + o_dim[None, :]
    b_top = tl.full((TILE,), float("-inf"), tl.float32)
    b_sum = tl.zeros((TILE,), tl.float32)
    b_acc = tl.zeros((TILE, C), tl.float32)
    width = tl.full((), TILE, tl.int64)
    for i_tile in tl.range(0, tl.cdiv(live, TILE), num_stages=STAGES):
        start = i_tile * width
        m_key = start + o_key < live
        # Dead positions are not loaded: they may hold NaN, which a weight of 0 does not remove.
        m = m_key[:, None] & m_dim[None, :]
        k = tl.load(p_k + start * K_ROW, mask=m, other=0).to(tl.float32)
        v = tl.load(p_v + start * V_ROW, mask=m, other=0).to(tl.float32)
        score = tl.sum(b_q[None, :] * k, axis=1) * (LOG2_E * D**-0.5)
        if k_scale is not None:
            score *= tl.load(k_scale + start + o_key, mask=m_key, other=0.0)
        score = tl.where(m_key, score, float("-inf"))
        top = tl.maximum(b_top, score)
        old, new = _weights(b_top, top), _weights(score, top)
        b_sum = b_sum * old + new
        if v_scale is not None:
            new *= tl.load(v_scale + start + o_key, mask=m_key, other=0.0)
        b_acc = b_acc * old[:, None] + new[:, None] * v
        b_top = top
    # The only exchange between threads: merge the lanes.
    top = tl.max(b_top[None, :], axis=1)
    share = _weights(b_top, top)
    total = tl.sum((b_sum * share)[None, :], axis=1)
    return total, tl.sum(b_acc * share[:, None], axis=0)[None, :]


@triton.jit
def _with_tile(
    b_q, p_k, p_v, o_k, o_v, k_scale, v_scale, at, m_key, m_dim, b_top, b_sum, b_acc,
    D: tl.constexpr,
):  # fmt: skip
    """Update the running softmax [ROWS], [ROWS], [ROWS, C] with one tile; its scales are ``at``.

    8-bit keys and values are integers, which every dtype of q represents exactly.
    """
    m = m_key[:, None] & m_dim[None, :]
    k = tl.load(p_k + o_k, mask=m, other=0)
    v = tl.load(p_v + o_v, mask=m, other=0)
    if k_scale is not None:
        k_scale = tl.load(k_scale + at, mask=m_key, other=0.0)
        v_scale = tl.load(v_scale + at, mask=m_key, other=0.0)
    score = tl.dot(b_q, tl.trans(k.to(b_q.dtype)), input_precision="ieee") * (LOG2_E * D**-0.5)
    if k_scale is not None:
        score *= k_scale[None, :]
    score = tl.where(m_key[None, :], score, float("-inf"))
    top = tl.maximum(b_top, tl.max(score, axis=1))
    old, new = _weights(b_top, top), _weights(score, top[:, None])
    b_sum = b_sum * old + tl.sum(new, axis=1)
    if v_scale is not None:
        new *= v_scale[None, :]
    b_acc *= old[:, None]
    b_acc = tl.dot(new.to(b_q.dtype), v.to(b_q.dtype), acc=b_acc, input_precision="ieee")
    return top, b_sum, b_acc


@triton.jit
def _attend_matrix(
    p_q, p_k, p_v, k_scale, v_scale, live,
    R: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, K_ROW: tl.constexpr,
    V_ROW: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """As `_attend_vector`, for the R queries of a head, padded to ROWS: [ROWS] and [ROWS, C]."""
    o_row = tl.arange(0, ROWS)
    o_key = tl.arange(0, TILE)
    o_dim = tl.arange(0, C)
    m_dim = o_dim < D
    m_q = (o_row < R)[:, None] & m_dim[None, :]
    b_q = tl.load(p_q + o_row[:, None] * D + o_dim[None, :], mask=m_q, other=0.0)
    p_k += o_key.to(tl.int64)[:, None] * K_ROW + o_dim[None, :]
    p_v += o_key.to(tl.int64)[:, None] * V_ROW + o_dim[None, :]
    b_top = tl.full((ROWS,), float("-inf"), tl.float32)
    b_sum = tl.zeros((ROWS,), tl.float32)
    b_acc = tl.zeros((ROWS, C), tl.float32)
    width = tl.full((), TILE, tl.int64)
    for i_tile in tl.range(0, tl.cdiv(live, TILE), num_stages=STAGES):
        start = i_tile * width
        m_key = start + o_key < live
        b_top, b_sum, b_acc = _with_tile(
            b_q, p_k, p_v, start * K_ROW, start * V_ROW, k_scale, v_scale, start + o_key, m_key,
            m_dim, b_top, b_sum, b_acc, D,
        )  # fmt: skip
    return b_sum, b_acc


@triton.jit
def _attend_pairs(
    q, keys, values, k_scale, v_scale, out, first, last, live, heads, capacity,
    k_batch, k_head, v_batch, v_head,
    R: tl.constexpr, ROWS: tl.constexpr, SHARING: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute `_attend_matrix` for the (row, head) pairs from ``first`` to ``last``; store results.

    One loop runs over the tiles of all pairs, so the next pair's tiles are in flight while the
    current pair is processed.
    """
    o_row = tl.arange(0, ROWS)
    o_key = tl.arange(0, TILE)
    o_dim = tl.arange(0, C)
    m_dim = o_dim < D
    m_q = (o_row < R)[:, None] & m_dim[None, :]
    o_q = o_row[:, None] * D + o_dim[None, :]
    o_k = o_key.to(tl.int64)[:, None] * K_ROW + o_dim[None, :]
    o_v = o_key.to(tl.int64)[:, None] * V_ROW + o_dim[None, :]
    b_top = tl.full((ROWS,), float("-inf"), tl.float32)
    b_sum = tl.zeros((ROWS,), tl.float32)
    b_acc = tl.zeros((ROWS, C), tl.float32)
    # A pair without a live position gets one empty tile, which gives 0 / 0.
    tiles = tl.maximum(tl.cdiv(live, TILE), 1)
    for i in tl.range(0, (last - first).to(tl.int32) * tiles, num_stages=STAGES):
        i_pair = first + i // tiles
        i_row, i_head = i_pair // heads, i_pair % heads // SHARING
        start = (i % tiles).to(tl.int64) * TILE
        m_key = start + o_key < live
        b_q = tl.load(q + i_pair * (R * D) + o_q, mask=m_q, other=0.0)
        p_k = keys + i_row * k_batch + i_head * k_head + start * K_ROW
        p_v = values + i_row * v_batch + i_head * v_head + start * V_ROW
        at = i_pair // SHARING * capacity + start + o_key
        goes_on = start > 0
        b_top = tl.where(goes_on, b_top, float("-inf"))
        b_sum = tl.where(goes_on, b_sum, 0.0)
        b_acc = tl.where(goes_on, b_acc, 0.0)
        b_top, b_sum, b_acc = _with_tile(
            b_q, p_k, p_v, o_k, o_v, k_scale, v_scale, at, m_key, m_dim, b_top, b_sum, b_acc, D
        )  # fmt: skip
        if i % tiles == tiles - 1:
            _store(out + i_pair * (R * D), b_acc, b_sum, R, D)


@triton.jit
def _store(out, acc, total, R: tl.constexpr, D: tl.constexpr):
    o_row = tl.arange(0, acc.shape[0])
    o_dim = tl.arange(0, acc.shape[1])
    value = (acc / total[:, None]).to(out.dtype.element_ty)
    m = (o_row < R)[:, None] & (o_dim < D)[None, :]
    tl.store(out + o_row[:, None] * D + o_dim[None, :], value, mask=m)


# Never specialised: the length changes with every step and the number of pairs with the batch, and
# values such as 1 or 16 would compile another variant.
@triton.jit(do_not_specialize=["length", "pairs"])
def _decode(
    q, keys, values, k_scale, v_scale, length, out, pairs, heads, capacity,
    k_batch, k_head, v_batch, v_head,
    EACH: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, SHARING: tl.constexpr,
    D: tl.constexpr, C: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, RESIDENT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Attend with R queries of one row; SHARING programs read the same keys.

    length: an int, or a pointer to one int for all rows or, with EACH, to one per row.
    RESIDENT: a program processes its share of the (row, head) pairs one after another.
    """
    if OVERLAP:
        _wait_for_last()
        _let_next_begin()
    i_pair = tl.program_id(0).to(tl.int64)
    i_row, i_head = i_pair // heads, i_pair % heads // SHARING
    live = length
    if length.dtype.is_ptr():
        live = tl.load(length + i_row * EACH)
    live = tl.minimum(tl.maximum(live.to(tl.int64), 0), capacity).to(tl.int32)
    if RESIDENT:
        programs = tl.num_programs(0)
        _attend_pairs(
            q, keys, values, k_scale, v_scale, out, i_pair * pairs // programs,
            (i_pair + 1) * pairs // programs, live, heads, capacity, k_batch, k_head, v_batch,
            v_head, R, ROWS, SHARING, D, C, K_ROW, V_ROW, TILE, STAGES,
        )  # fmt: skip
    else:
        p_q = q + i_pair * (R * D)
        p_k = keys + i_row * k_batch + i_head * k_head
        p_v = values + i_row * v_batch + i_head * v_head
        if k_scale is not None:
            # [B, G, T], one scale per key and value.
            at = i_pair // SHARING * capacity
            k_scale += at
            v_scale += at
        if ROWS == 1:
            total, acc = _attend_vector(
                p_q, p_k, p_v, k_scale, v_scale, live, D, C, K_ROW, V_ROW, TILE, STAGES
            )
        else:
            total, acc = _attend_matrix(
                p_q, p_k, p_v, k_scale, v_scale, live, R, ROWS, D, C, K_ROW, V_ROW, TILE, STAGES
            )
        # No live position gives 0 / 0.
        _store(out + i_pair * (R * D), acc, total, R, D)


def unsupported_reason(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why this cannot take the call, or None."""
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {q.dtype}"
    if not 1 <= q.shape[2] <= 128:
        return f"it takes heads of dimension 1 to 128, not {q.shape[2]}"
    if k_cache.shape[2] >= 2**31 - 1024 or q.shape[0] * q.shape[1] >= 2**31:
        return "it counts positions, and rows times heads, in 32 bits"
    if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
        return "it takes caches whose last stride is 1"
    if k_scale is not None and not (k_scale.is_contiguous() and v_scale.is_contiguous()):
        return "it takes contiguous scales"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_cache, v_cache)):
        return "it has no backward pass (torch.no_grad() says that none is needed)"
    return None


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, *,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.decode_attention`; takes calls that `unsupported_reason` accepts."""
    lengths, length = (length, 0) if isinstance(length, Tensor) else (None, length)
    return _attend(q, k_cache, v_cache, k_scale, v_scale, lengths, length)


def tuning_key(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int | Tensor, **scales: Tensor | None
) -> tuple[str, int]:
    """Kind and size for `tuning`; without the batch, on which an image's bits must not depend."""
    cache = " int8 cache" if k_cache.dtype == torch.int8 else ""
    return f"{dtype_name(q)} D={q.shape[2]}{cache}", k_cache.shape[2]


def _constants(group: int, D: int, matrix: bool, values: int) -> dict[str, int]:
    """Compile-time constants of a kernel, from queries per key-value head and head dim."""
    C, R, ROWS = triton.next_power_of_2(D), 1, 1
    if matrix:
        # The matrix unit needs at least 16 channels and 16 queries.
        C = max(16, C)
        R = max(n for n in range(1, MAX_ROWS + 1) if group % n == 0)
        ROWS = max(16, triton.next_power_of_2(R))
    # It also needs at least 16 keys, for any head dim.
    tile = max(16, min(MAX_KEYS, values // C))
    return {"R": R, "ROWS": ROWS, "SHARING": group // R, "D": D, "C": C, "TILE": tile}


@registered(
    "decode_attention_triton(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k_scale, "
    "Tensor? v_scale, Tensor? lengths, SymInt length) -> Tensor",
    lambda q, *rest: q.new_empty(q.shape),
)
def _attend(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    lengths: Tensor | None, length: int,
) -> Tensor:  # fmt: skip
    (B, H, D), (G, T), device = q.shape, k_cache.shape[1:3], q.device
    out = torch.empty(B, H, D, dtype=q.dtype, device=device)
    if out.numel() == 0:
        return out
    q = q.contiguous()
    space = HALF if q.itemsize == 2 else FLOAT32
    setting = space.at(device, *tuning_key(q, k_cache, v_cache, length))
    # Queries that share a head's keys read them once, which only the matrix unit form does.
    matrix = q.itemsize == 2 and (H > G or setting.matrix == 1)
    constants = _constants(H // G, D, matrix, setting.values)
    heads, each = H // constants["R"], False
    if lengths is not None:
        length, each = lengths.contiguous(), lengths.numel() > 1
    # Bits do not depend on this: each pair is computed by one program in any case.
    most = setting.resident * WANTED_PROGRAMS if matrix and not each else 0
    resident = 0 < most < B * heads
    with on(device):
        _decode[(most if resident else B * heads,)](
            q, k_cache, v_cache, k_scale, v_scale, length, out, B * heads, heads, T,
            k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1),
            EACH=int(each), K_ROW=k_cache.stride(2), V_ROW=v_cache.stride(2),
            STAGES=setting.stages, RESIDENT=resident, **constants, **overlap(device),
            num_warps=setting.warps,
        )  # fmt: skip
    return out
