"""Triton `ops.nearest_code`: screened on the matrix unit, certified, exact in float64.

What it computes: for every row of z [N, d] the row of codebook [K, d] with the largest cosine, the
lowest index on ties, int64 [N], and that cosine, float32 [N]. Five launches:

    _prepare   directions of the codes: float16 for the screen, float32 and float64 for the rescan
    _screen    float16 scores; of each row, in each of 4 lanes, the best chunk of 32 codes and the
               value of the second best: nothing of size N x K leaves the registers
    _rescan    float64 scores of the chunks that can hold the answer; rows where a second chunk of
               one lane can hold it too are listed
    _resolve   float64 scores of all codes, for the listed rows only (about 1 %)
    _merge     the best of _resolve's splits

Bytes: (4 d + 12) N + 4 d K in and out, about 120 N + (2 C + 4 d + 8) K besides. Floor on an H200 at
N = 65,536, K = 16,384, d = 12: one maximum per score, 73 us. README.md derives the error bound of
the screen, the floor and what was rejected.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on

# Codes of one tile of the screen, and of one chunk, the unit that it tells apart. Chunks are lanes
# of the tile's register layout, so their maxima need no exchange between threads. Smaller chunks
# cost the screen more instructions per score (5 per chunk), larger ones the rescan more loads.
TILE = tl.constexpr(128)
CHUNK = tl.constexpr(32)
LANES = tl.constexpr(4)
# Rows of one program of the screen. 128 rows keep 128 accumulators in each of 128 threads.
SCREEN_ROWS = 128
SCREEN_WARPS = 4
SCREEN_STAGES = 3
RESCAN_ROWS = 16
RESOLVE_ROWS = tl.constexpr(8)
# Programs along the listed rows, which only the device knows the number of.
RESOLVE_PROGRAMS = 64
# Enough programs of the screen to fill the multiprocessors twice where rows are few.
WANTED_PROGRAMS = 264
MAX_SPLITS = 32
# Powers of two that keep float16 out of its subnormal range (README.md, "Scales").
Z_SCALE = tl.constexpr(64.0)
E_SCALE = tl.constexpr(256.0)
# F.normalize's: shorter codes are divided by this instead of by their length.
EPS = tl.constexpr(1e-12)
# Factor on the error bound; the tests set it to 0 to see that it is needed.
BOUND = 1.0


@triton.jit
def _prepare(codebook, packed, exact, inverse, facts, K, D: tl.constexpr, C: tl.constexpr):
    """One chunk of codes; those past the end repeat the last."""
    i_chunk = tl.program_id(0).to(tl.int64)
    o_code = tl.arange(0, CHUNK)
    o_dim = tl.arange(0, C)
    code = i_chunk * CHUNK + o_code
    source = tl.minimum(code, K - 1)
    m_dim = (o_dim < D)[None, :]
    p_e = codebook + source[:, None] * D + o_dim[None, :]
    e = tl.load(p_e, mask=m_dim, other=0.0).to(tl.float32)
    broken = tl.max(tl.where(tl.abs(e) < float("inf"), 0, 1), axis=1) > 0
    e = tl.where(broken[:, None], 0.0, e)
    wide = e.to(tl.float64)
    inv = 1.0 / tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), EPS)
    unit = wide * inv[:, None]
    half = (unit.to(tl.float32) * E_SCALE).to(tl.float16)
    left = unit - half.to(tl.float64) / E_SCALE
    # Rounded up: float64 to float32 may round down.
    residual = tl.sqrt(tl.max(tl.sum(left * left, axis=1))).to(tl.float32) * (1.0 + 2.0**-20)
    # facts: rows listed, largest residual as bits (order-preserving), K - first broken code.
    tl.atomic_max(facts + 1, residual.to(tl.int32, bitcast=True).to(tl.int64))
    tl.atomic_max(facts + 2, tl.max(tl.where(broken, K - source, 0)))
    # Code 32 j + 2 i + b of a tile stands at 8 i + 2 j + b: lane j then holds chunk j.
    lane = i_chunk % LANES
    place = (i_chunk // LANES) * TILE + 8 * (o_code // 2) + 2 * lane + o_code % 2
    tl.store(packed + place[:, None] * C + o_dim[None, :], half)
    p_exact = exact + (i_chunk * D + o_dim[None, :]) * CHUNK + o_code[:, None]
    tl.store(p_exact, e, mask=m_dim & (o_code >= 0)[:, None])
    tl.store(inverse + code, inv)


@triton.jit
def _screen(
    z, packed, facts, best, chunk, second, slack, N, tiles, splits, bound,
    D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Best and second best chunk of each lane, for some rows and one split of the tiles."""
    o_dim = tl.arange(0, C)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = row < N
    p_z = z + row[:, None] * D + o_dim[None, :]
    value = tl.load(p_z, mask=m_row[:, None] & (o_dim < D)[None, :], other=0.0).to(tl.float32)
    # Scale by a power of two, exactly, to a largest value between 1 and 4.
    bits = tl.max(tl.abs(value), axis=1).to(tl.int32, bitcast=True)
    scale = (tl.maximum(254 - (bits >> 23), 1) << 23).to(tl.float32, bitcast=True)
    value = value * scale[:, None]
    half = (value * Z_SCALE).to(tl.float16)
    left = value - half.to(tl.float32) * (1.0 / Z_SCALE)

    lane = tl.arange(0, LANES)
    b_best = tl.full((ROWS, LANES), float("-inf"), tl.float32)
    b_second = tl.full((ROWS, LANES), float("-inf"), tl.float32)
    b_tile = tl.zeros((ROWS, LANES), tl.int32)
    i_split = tl.program_id(1)
    per_split = tl.cdiv(tiles, splits)
    first = i_split * per_split
    last = tl.minimum(first + per_split, tiles)
    p_e = packed + tl.arange(0, TILE)[None, :] * C + o_dim[:, None]
    stride = tl.full((), TILE * C, tl.int64)
    for i_tile in range(first, last):
        e = tl.load(p_e + i_tile * stride)
        scores = tl.dot(half, e, input_precision="ieee", out_dtype=tl.float32)
        lanes = tl.reshape(scores, (ROWS, TILE // 8, LANES, 2))
        top = tl.max(tl.max(lanes, axis=3), axis=1)
        b_second = tl.maximum(b_second, tl.minimum(b_best, top))
        b_tile = tl.where(top > b_best, i_tile, b_tile)
        b_best = tl.maximum(b_best, top)

    p_out = (row[:, None] * splits + i_split) * LANES + lane[None, :]
    tl.store(best + p_out, b_best, mask=m_row[:, None])
    tl.store(chunk + p_out, b_tile * LANES + lane[None, :], mask=m_row[:, None])
    tl.store(second + p_out, b_second, mask=m_row[:, None])
    # README.md, "Error bound": twice the largest possible error of a score, in its own units.
    residual = tl.load(facts + 1).to(tl.int32).to(tl.float32, bitcast=True)
    rest = tl.sqrt(tl.sum(left * left, axis=1))
    size = tl.sqrt(tl.sum(value * value, axis=1))
    error = (rest + C * 2.0**-22 * (size + rest)) * (1.0 + residual) + size * residual
    m_first = m_row & (i_split == 0)
    tl.store(slack + row, error * (2.002 * bound) * Z_SCALE * E_SCALE, mask=m_first)


@triton.jit
def _dot(z, exact, row, m_row, chunk, lane, D: tl.constexpr):
    """float64 products [R, W] of rows and codes; the same order for all, so equal codes tie."""
    total = tl.zeros((row.shape[0], lane.shape[1]), tl.float64)
    for i in range(D):
        a = tl.load(z + row * D + i, mask=m_row, other=0.0).to(tl.float32).to(tl.float64)
        p_e = exact + (chunk.to(tl.int64) * D + i) * CHUNK + lane
        total += a[:, None] * tl.load(p_e).to(tl.float64)
    return total


@triton.jit
def _rescan(
    z, exact, inverse, facts, best, chunk, second, slack, listed, code, score, N, K,
    SLOTS: tl.constexpr, D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Exact answer of rows whose candidates are all known; the others are listed."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = row < N
    o_dim = tl.arange(0, C)
    p_z = z + row[:, None] * D + o_dim[None, :]
    value = tl.load(p_z, mask=m_row[:, None] & (o_dim < D)[None, :], other=0.0).to(tl.float32)
    finite = tl.min(tl.where(tl.abs(value) < float("inf"), 1, 0), axis=1) > 0
    length = tl.sqrt(tl.sum(value.to(tl.float64) * value.to(tl.float64), axis=1))
    broken = tl.load(facts + 2)
    live = m_row & finite & (length > 0) & (broken == 0)

    slot = tl.arange(0, SLOTS)[None, :]
    p_slot = row[:, None] * SLOTS + slot
    m_slot = m_row[:, None] & (slot >= 0)
    left = tl.load(best + p_slot, mask=m_slot, other=float("-inf"))
    where = tl.load(chunk + p_slot, mask=m_slot, other=0)
    limit = tl.max(left, axis=1) - tl.load(slack + row, mask=m_row, other=0.0)
    more = tl.max(tl.load(second + p_slot, mask=m_slot, other=float("-inf")), axis=1) >= limit
    left = tl.where(live[:, None] & (left >= limit[:, None]), left, float("-inf"))

    lane = tl.arange(0, CHUNK)[None, :]
    b_score = tl.full((ROWS,), float("-inf"), tl.float64)
    b_code = tl.full((ROWS,), 2**31 - 1, tl.int32)
    # One candidate of every row at a time, most rows having one only.
    while tl.max(left) > float("-inf"):
        top, pick = tl.max(left, axis=1, return_indices=True)
        taken = slot == pick[:, None]
        at = tl.sum(tl.where(taken, where, 0), axis=1)
        left = tl.where(taken, float("-inf"), left)
        member = at[:, None] * CHUNK + lane
        exact_score = _dot(z, exact, row, m_row, at[:, None], lane, D) * tl.load(inverse + member)
        valid = (top > float("-inf"))[:, None] & (member < K)
        exact_score = tl.where(valid, exact_score, float("-inf"))
        most = tl.max(exact_score, axis=1)
        lowest = tl.min(tl.where(exact_score == most[:, None], member, 2**31 - 1), axis=1)
        b_code = tl.where(
            most > b_score, lowest, tl.where(most == b_score, tl.minimum(lowest, b_code), b_code)
        )
        b_score = tl.maximum(b_score, most)

    shown = tl.where(live, (b_score / tl.maximum(length, EPS)).to(tl.float32), 0.0)
    undefined = (finite == 0) | (broken > 0)
    tl.store(score + row, tl.where(undefined, float("nan"), shown), mask=m_row)
    other = tl.where(finite & (broken > 0), K - broken, 0)
    tl.store(code + row, tl.where(live, b_code.to(tl.int64), other), mask=m_row)
    m_list = live & more
    place = tl.atomic_add(facts + tl.zeros_like(row), 1, mask=m_list)
    tl.store(listed + place, row, mask=m_list)


@triton.jit
def _resolve(
    z, exact, inverse, facts, listed, part_score, part_code, K, chunks,
    SPLITS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Best float64 score of listed rows over one split of all codes."""
    count = tl.load(facts)
    i_split = tl.program_id(1)
    width: tl.constexpr = LANES * CHUNK
    o = tl.arange(0, width)[None, :]
    steps = tl.cdiv(tl.cdiv(chunks, LANES), SPLITS)
    for i_rows in range(tl.program_id(0), tl.cdiv(count, RESOLVE_ROWS), tl.num_programs(0)):
        slot = i_rows * RESOLVE_ROWS + tl.arange(0, RESOLVE_ROWS).to(tl.int64)
        m_slot = slot < count
        row = tl.load(listed + slot, mask=m_slot, other=0)
        b_score = tl.full((RESOLVE_ROWS, width), float("-inf"), tl.float64)
        b_code = tl.full((RESOLVE_ROWS, width), 2**31 - 1, tl.int32)
        for i in range(i_split * steps, tl.minimum((i_split + 1) * steps, chunks // LANES)):
            member = i * width + o
            total = _dot(z, exact, row, m_slot, member // CHUNK, o % CHUNK, D)
            total = tl.where(member < K, total * tl.load(inverse + member), float("-inf"))
            # Later codes are higher: they must be better, not as good.
            b_code = tl.where(total > b_score, member, b_code)
            b_score = tl.maximum(b_score, total)
        most = tl.max(b_score, axis=1)
        lowest = tl.min(tl.where(b_score == most[:, None], b_code, 2**31 - 1), axis=1)
        tl.store(part_score + slot * SPLITS + i_split, most, mask=m_slot)
        tl.store(part_code + slot * SPLITS + i_split, lowest, mask=m_slot)


@triton.jit
def _merge(
    z, facts, listed, part_score, part_code, code, score,
    SPLITS: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Best split of each listed row."""
    count = tl.load(facts)
    o_dim = tl.arange(0, C)
    for slot in range(tl.program_id(0).to(tl.int64), count, tl.num_programs(0)):
        row = tl.load(listed + slot)
        at = slot * SPLITS + tl.arange(0, SPLITS)
        scores = tl.load(part_score + at)
        most = tl.max(scores, axis=0)
        lowest = tl.min(tl.where(scores == most, tl.load(part_code + at), 2**31 - 1), axis=0)
        value = tl.load(z + row * D + o_dim, mask=o_dim < D, other=0.0).to(tl.float32)
        length = tl.sqrt(tl.sum(value.to(tl.float64) * value.to(tl.float64), axis=0))
        tl.store(code + row, lowest.to(tl.int64))
        tl.store(score + row, (most / tl.maximum(length, EPS)).to(tl.float32))


def unsupported_reason(
    z: Tensor, codebook: Tensor, *, normalize: bool = True, return_score: bool = False
) -> str | None:
    """Why this cannot take the call, or None."""
    if not normalize:
        return "it compares directions only (normalize=True)"
    if z.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {z.dtype}"
    if not 4 <= z.shape[1] <= 64:
        return f"it takes vectors of dimension 4 to 64, not {z.shape[1]}"
    if codebook.shape[0] > 2**31 - 1024:
        return "it counts codes in 32 bits"
    return None


def nearest_code(
    z: Tensor, codebook: Tensor, *, normalize: bool = True, return_score: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """See `vfmtok_fast.ops.nearest_code`; takes the calls that `unsupported_reason` lets pass."""
    code, score = torch.ops.vfmtok_fast.nearest_code_triton(z, codebook)
    return (code, score) if return_score else code


def _launch(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    (n, d), k, device = z.shape, codebook.shape[0], z.device
    code = torch.empty(n, dtype=torch.int64, device=device)
    score = torch.empty(n, dtype=torch.float32, device=device)
    if n == 0:
        return code, score
    z, codebook = z.contiguous(), codebook.contiguous()
    columns = max(16, triton.next_power_of_2(d))
    tiles = triton.cdiv(k, TILE.value)
    codes, chunks = tiles * TILE.value, tiles * LANES.value
    row_blocks = triton.cdiv(n, SCREEN_ROWS)
    splits = triton.next_power_of_2(max(1, min(MAX_SPLITS, tiles, WANTED_PROGRAMS // row_blocks)))
    slots, parts = splits * LANES.value, min(MAX_SPLITS, 4 * splits)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    packed = empty(codes, columns, dtype=torch.float16)
    exact = empty(codes, d, dtype=torch.float32)
    inverse = empty(codes, dtype=torch.float64)
    facts = torch.zeros(3, dtype=torch.int64, device=device)
    best, second = (empty(n, slots, dtype=torch.float32) for _ in range(2))
    chunk = empty(n, slots, dtype=torch.int32)
    slack = empty(n, dtype=torch.float32)
    listed = empty(n, dtype=torch.int64)
    part_score = empty(n, parts, dtype=torch.float64)
    part_code = empty(n, parts, dtype=torch.int32)
    with on(device):
        _prepare[(chunks,)](codebook, packed, exact, inverse, facts, k, D=d, C=columns, num_warps=1)
        _screen[(row_blocks, splits)](
            z, packed, facts, best, chunk, second, slack, n, tiles, splits, BOUND,
            D=d, C=columns, ROWS=SCREEN_ROWS, num_warps=SCREEN_WARPS, num_stages=SCREEN_STAGES,
        )  # fmt: skip
        _rescan[(triton.cdiv(n, RESCAN_ROWS),)](
            z, exact, inverse, facts, best, chunk, second, slack, listed, code, score, n, k,
            SLOTS=slots, D=d, C=columns, ROWS=RESCAN_ROWS, num_warps=4,
        )  # fmt: skip
        _resolve[(min(RESOLVE_PROGRAMS, triton.cdiv(n, RESOLVE_ROWS.value)), parts)](
            z, exact, inverse, facts, listed, part_score, part_code, k, chunks,
            SPLITS=parts, D=d, num_warps=4,
        )  # fmt: skip
        _merge[(min(RESOLVE_PROGRAMS, n),)](
            z, facts, listed, part_score, part_code, code, score,
            SPLITS=parts, D=d, C=columns, num_warps=1,
        )  # fmt: skip
    return code, score


def _fake(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape[0], dtype=torch.int64), z.new_empty(z.shape[0], dtype=torch.float32)


def _mark_discrete(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _no_gradient(ctx, *grads: Tensor) -> tuple[None, None]:
    return None, None


_NAME = "vfmtok_fast::nearest_code_triton"
_library = torch.library.Library("vfmtok_fast", "FRAGMENT")
_library.define("nearest_code_triton(Tensor z, Tensor codebook) -> (Tensor code, Tensor score)")
_library.impl("nearest_code_triton", _launch, "CompositeExplicitAutograd")
torch.library.register_fake(_NAME, _fake, lib=_library)
torch.library.register_autograd(_NAME, _no_gradient, setup_context=_mark_discrete, lib=_library)
