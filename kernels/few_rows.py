"""Linear layers of a few rows in one launch, the body of four ops of a decoding step.

What it computes: y[r, n] = sum over k of x[r, k] * w[n, k] for x [B, K] and w [N, K], B <= 32, for
one weight or two that share x, with the RMSNorm of x folded in: a row's scale 1 / rms(x[r]) leaves
the sum and is multiplied in at the end, the norm's weight is multiplied into x on the way.

The floor is reading w: 2 N K bytes in half precision, 1.5 us for GPT-L's qkv at an H200's 4.3 TB/s
(5.3 us measured; decode_step.md says why). What may not be lost is latency, so a program has few
rows of w (16) and all its loads under way at once: SLICES warps each take every SLICES-th piece of
K through their own matrix product, pieces come by asynchronous copies STAGES deep, and the warps'
sums meet once, at the end, in one order: the same bits on every run, whatever the other rows hold.

A weight may be int8 with a float32 scale for each row [N]. Its values are exact in every type of x,
and the scale leaves the sum as the norm's does, so only half of the bytes is read and nothing is
rounded on the way.

More rows go to cuBLAS between small kernels, see `rms_norm` and `dequantized` here and the ops.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import _let_next_begin, _wait_for_last, on, overlap
from .tuning import Space

# Rows of x that one program takes, padded to 8, 16 or 32; more would read x more often than w.
# Predicted, not measured: at 32 rows a program of a layer with K = 1024 loads as much of x from L2
# as of w.
MAX_ROWS = 32
# Rows of w in a program: the height of the matrix unit's tile. Wider, there would be too few
# programs: GPT-L's output projection has 64 of 16.
TILE = tl.constexpr(16)
# Pieces of K that are multiplied side by side, by one warp each.
SLICES = tl.constexpr(4)
# Pieces on their way at once, and bytes of a row of w to a piece. Not by the number of rows: an
# image must not depend on the batch that it is in.
PRODUCTS = Space(
    "few_rows.products",
    {"stages": (2, 3, 4), "piece": (128, 256)},
    {80: {"stages": 4, "piece": 256}},
    bits=("piece",),
)
# Bytes of weights that a program asks for before it waits for the kernel ahead: the programs that
# an H200 holds at once, two on each of 132 multiprocessors, ask for 17 MB at most, which takes
# longer than the wait. GPT-3B's whole rows, up to 111 MB, would push one another out of the L2
# cache (50 MB) before they are read.
FETCH = tl.constexpr(65536)


@triton.jit
def _fetch(pointers):
    """Bring cache lines into L2, without waiting for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers.to(tl.int64)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _fetch_rows(w, row, m_n, K: tl.constexpr, BYTES: tl.constexpr):
    """The first BYTES of TILE rows of w [N, K], a line of 128 bytes at a time."""
    line: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
    width: tl.constexpr = 8 * line
    for k in range(0, min(K, BYTES // TILE * line // 128), width):
        o = k + line * tl.arange(0, 8)
        # Past the end of a row, its last element once more.
        at = row.to(tl.int64)[:, None] * K + tl.minimum(o, K - 1)[None, :]
        _fetch(w + tl.where(m_n[:, None], at, 0))


@triton.jit
def _inverse_rms(p_x, o_k, m_r, eps, K: tl.constexpr, P: tl.constexpr, DEPTH: tl.constexpr):
    """1 / rms of every row of x, [1, P]."""
    squares = tl.zeros((SLICES, DEPTH, P), tl.float32)
    for k in range(0, K, SLICES * DEPTH):
        mask = (k + o_k < K)[:, :, None] & m_r[None, None, :]
        value = tl.load(p_x + k, mask=mask, other=0.0).to(tl.float32)
        squares += value * value
    return tl.rsqrt(tl.sum(tl.sum(squares, axis=0), axis=0) / K + eps)[None, :]


@triton.jit
def _products(
    x, norm, w_a, w_b, scale_a, scale_b, row_a, row_b, m_n, rows, eps,
    K: tl.constexpr, P: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, PAIR: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Rows ``row_a`` of w_a and ``row_b`` of w_b [TILE] times RMSNorm(x), each [TILE, P] float32.

    Without NORM times x, without PAIR both are the first. ``m_n`` [TILE] says which rows are there.
    Scales are those of int8 weights, or None.
    """
    o_r = tl.arange(0, P)
    m_r = o_r < rows
    o_k = (tl.arange(0, SLICES) * DEPTH)[:, None] + tl.arange(0, DEPTH)[None, :]
    p_a = w_a + row_a.to(tl.int64)[None, :, None] * K + o_k[:, None, :]
    p_b = w_b + row_b.to(tl.int64)[None, :, None] * K + o_k[:, None, :]
    p_x = x + o_r.to(tl.int64)[None, None, :] * K + o_k[:, :, None]
    if OVERLAP:
        bytes_each: tl.constexpr = FETCH // 2 if PAIR else FETCH
        _fetch_rows(w_a, row_a, m_n, K, bytes_each)
        if PAIR:
            _fetch_rows(w_b, row_b, m_n, K, bytes_each)
        _wait_for_last()
        _let_next_begin()
    a = tl.zeros((SLICES, TILE, P), tl.float32)
    b = tl.zeros((SLICES, TILE, P), tl.float32)
    squares = tl.zeros((SLICES, DEPTH, P), tl.float32)
    # x times the norm's weight, without the scale, may be too large for float16.
    early: tl.constexpr = NORM and x.dtype.element_ty == tl.float16
    scale = tl.full((1, P), 1.0, tl.float32)
    if early:
        scale = _inverse_rms(p_x, o_k, m_r, eps, K, P, DEPTH)
    for k in tl.range(0, K, SLICES * DEPTH, num_stages=STAGES):
        m_k = k + o_k < K
        m_w = m_n[None, :, None] & m_k[:, None, :]
        # Weights are read once; they need not push activations out of the L2 cache.
        w = tl.load(p_a + k, mask=m_w, other=0, eviction_policy="evict_first")
        m_x = m_k[:, :, None] & m_r[None, None, :]
        value = tl.load(p_x + k, mask=m_x, other=0.0)
        if NORM:
            wide = value.to(tl.float32)
            gain = tl.load(norm + k + o_k, mask=m_k, other=0.0).to(tl.float32)
            if early:
                wide *= scale[None, :, :]
            else:
                squares += wide * wide
            value = (wide * gain[:, :, None]).to(value.dtype)
        a = tl.dot(w.to(value.dtype), value, a, input_precision="ieee")
        if PAIR:
            w = tl.load(p_b + k, mask=m_w, other=0, eviction_policy="evict_first")
            b = tl.dot(w.to(value.dtype), value, b, input_precision="ieee")
    sum_a = tl.sum(a, axis=0)
    if scale_a is not None:
        sum_a *= tl.load(scale_a + row_a, mask=m_n, other=0.0)[:, None]
    sum_b = sum_a
    if PAIR:
        sum_b = tl.sum(b, axis=0)
        if scale_b is not None:
            sum_b *= tl.load(scale_b + row_b, mask=m_n, other=0.0)[:, None]
    if NORM and not early:
        scale = tl.rsqrt(tl.sum(tl.sum(squares, axis=0), axis=0) / K + eps)[None, :]
        sum_a *= scale
        sum_b *= scale
    return sum_a, sum_b


@triton.jit
def _tile(N):
    """Rows of w that this program has, and which of them are there."""
    o_n = tl.program_id(0) * TILE + tl.arange(0, TILE)
    return o_n, o_n < N


@triton.jit
def _store(out, o_n, m_n, rows, N, value, P: tl.constexpr):
    """Write ``value`` [TILE, P] into out [rows, N]."""
    o_r = tl.arange(0, P)
    p_out = out + o_r.to(tl.int64)[None, :] * N + o_n[:, None]
    mask = m_n[:, None] & (o_r < rows)[None, :]
    tl.store(p_out, value.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(x, norm, out, rows, eps, K: tl.constexpr, WIDTH: tl.constexpr):
    """One row of x / rms(x) * norm, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, WIDTH)
    m_k = (o_k < K) & (row < rows)
    value = tl.load(x + row * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    gain = tl.load(norm + o_k, mask=m_k, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / K + eps)
    tl.store(out + row * K + o_k, (value * gain).to(out.dtype.element_ty), mask=m_k)


def unsupported_reason(x: Tensor, *rest: Tensor | None) -> str | None:
    """Why these ops cannot take the call, or None; ``rest`` is all else that is read."""
    weights = [tensor for tensor in rest if tensor is not None]
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {x.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        return "it computes in the dtype of its input, which autocast would change"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        return "it has no backward pass (wrap the call in torch.no_grad())"
    if not all(t.is_contiguous() for t in weights):
        return "it takes contiguous weights"
    return None


def dequantized(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """An int8 weight in full, rounded once, for the ops' many rows; any other as it is."""
    if scale is None:
        return weight
    return torch.mul(weight, scale[:, None], out=weight.new_empty(weight.shape, dtype=dtype))


def constants(x: Tensor, weight: Tensor, *, pair: bool) -> dict[str, object]:
    """Compile-time arguments of a launch."""
    rows, K = x.shape
    padded = max(8, triton.next_power_of_2(rows))
    kind = f"{str(x.dtype)[6:]} {str(weight.dtype)[6:]} K={K}"
    stages, piece = PRODUCTS.at(x.device, kind, 1)
    # As chosen, or what keeps the pieces that wait in shared memory within the 99 KiB that the
    # smallest chips give a program.
    depth = piece // weight.itemsize
    line = (2 if pair else 1) * TILE.value * weight.itemsize + (padded + 1) * x.itemsize
    while (stages - 1) * SLICES.value * depth * line > 96 * 1024:
        depth //= 2
    return {
        "K": K, "P": padded, "DEPTH": depth, "STAGES": stages, **overlap(x.device),
        # Left alone, the assembler spills one register rather than lose occupancy, of which there
        # is enough.
        "num_warps": SLICES.value, "maxnreg": 255,
    }  # fmt: skip


def grid(N: int) -> tuple[int]:
    return (triton.cdiv(N, TILE.value),)


def rms_norm(x: Tensor, norm_weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of x [B, K], for the ops' many rows."""
    rows, K = x.shape
    out = torch.empty_like(x)
    with on(x.device):
        _rms_norm[(rows,)](
            x, norm_weight, out, rows, eps, K=K, WIDTH=triton.next_power_of_2(K), num_warps=4
        )
    return out
