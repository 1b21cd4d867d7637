"""Triton `ops.qkv_rotary`: RMSNorm, the product, the rotation and the append in one launch.

q, k, v = RMSNorm(x) @ qkv_weight.T; pairs (2 i, 2 i + 1) of q and k are rotated by the table's row
``position``; k and v go into the cache [B, H, T, D]. A program has 16 pairs, both halves of each in
its registers: the even rows of the weight are one product, the odd ones the other. Bytes: the
weight's, 6 C^2 in half precision; `few_rows` has the loop, decode_step.md what was measured. Above
`few_rows.MAX_ROWS` rows cuBLAS makes the product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import few_rows
from .few_rows import _products, _tile
from .launch import on

SPACES = (few_rows.PRODUCTS,)

# Values [rows, pairs] of a program that rotates products which are there already.
ROWS, PAIRS = 8, 128


@triton.jit
def _rotate_store(
    even, odd, o_n, m_n, o_r, m_r, rotary, at, out, k_cache, v_cache,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rotate ``even`` and ``odd`` [pairs, rows] of pairs ``o_n`` and put them where they belong."""
    half: tl.constexpr = D // 2
    width: tl.constexpr = H * half
    part = o_n // width
    head = (o_n % width) // half
    pair = o_n % half
    p_table = rotary + (at * half + pair) * 2
    turns = m_n & (part < 2)
    cos = tl.load(p_table, mask=turns, other=1.0)[:, None]
    sin = tl.load(p_table + 1, mask=turns, other=0.0)[:, None]
    first = even * cos - odd * sin
    second = odd * cos + even * sin
    row = o_r.to(tl.int64)[None, :]
    mask = m_n[:, None] & m_r[None, :]
    kind = out.dtype.element_ty
    p_q = out + row * (2 * width) + 2 * (o_n % width)[:, None]
    m_q = mask & (part == 0)[:, None]
    tl.store(p_q, first.to(kind), mask=m_q)
    tl.store(p_q + 1, second.to(kind), mask=m_q)
    place = ((row * H + head[:, None]) * T + at) * D + 2 * pair[:, None]
    m_k = mask & (part == 1)[:, None]
    tl.store(k_cache + place, first.to(kind), mask=m_k)
    tl.store(k_cache + place + 1, second.to(kind), mask=m_k)
    m_v = mask & (part == 2)[:, None]
    tl.store(v_cache + place, even.to(kind), mask=m_v)
    tl.store(v_cache + place + 1, odd.to(kind), mask=m_v)


@triton.jit
def _position(position, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        return tl.load(position).to(tl.int64)
    return position.to(tl.int64)


@triton.jit(do_not_specialize=["rows", "position"])
def _qkv_rotary(
    x, norm, weight, scale, rotary, position, out, k_cache, v_cache, rows, eps,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ON_DEVICE: tl.constexpr,
    K: tl.constexpr, P: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    o_n, m_n = _tile(3 * H * D // 2)
    even, odd = _products(
        x, norm, weight, weight, scale, scale, 2 * o_n, 2 * o_n + 1, m_n, rows, eps,
        K, P, DEPTH, STAGES, True, True, OVERLAP,
    )  # fmt: skip
    o_r = tl.arange(0, P)
    at = _position(position, ON_DEVICE)
    _rotate_store(even, odd, o_n, m_n, o_r, o_r < rows, rotary, at, out, k_cache, v_cache, H, T, D)


@triton.jit(do_not_specialize=["rows", "position"])
def _rotary(
    qkv, rotary, position, out, k_cache, v_cache, rows,
    H: tl.constexpr, T: tl.constexpr, D: tl.constexpr, ON_DEVICE: tl.constexpr,
    ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The rotation and the append alone, of products [rows, 3 H D] that are there already."""
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_n = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    m_r, m_n = o_r < rows, o_n < 3 * H * D // 2
    p_qkv = qkv + o_r.to(tl.int64)[None, :] * (3 * H * D) + 2 * o_n[:, None]
    mask = m_n[:, None] & m_r[None, :]
    even = tl.load(p_qkv, mask=mask, other=0.0).to(tl.float32)
    odd = tl.load(p_qkv + 1, mask=mask, other=0.0).to(tl.float32)
    at = _position(position, ON_DEVICE)
    _rotate_store(even, odd, o_n, m_n, o_r, m_r, rotary, at, out, k_cache, v_cache, H, T, D)


def unsupported_reason(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    rotary: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> str | None:
    """Why this cannot take the call, or None."""
    if rotary.dtype != torch.float32:
        return f"it takes a float32 rotary table, not {rotary.dtype}"
    if not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return "it takes contiguous caches"
    return few_rows.unsupported_reason(x, norm_weight, qkv_weight, scale, rotary, k_cache, v_cache)


def qkv_rotary(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    rotary: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    position: int | Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See `vfmtok_fast.ops.qkv_rotary`; takes what `unsupported_reason` lets pass."""
    at, number = (position, 0) if isinstance(position, Tensor) else (None, position)
    return torch.ops.vfmtok_fast.qkv_rotary_triton(
        x, norm_weight, qkv_weight, scale, rotary, k_cache, v_cache, at, number, eps
    )


def _launch(
    x: Tensor, norm_weight: Tensor, weight: Tensor, scale: Tensor | None, rotary: Tensor,
    k_cache: Tensor, v_cache: Tensor, at: Tensor | None, number: int, eps: float,
) -> Tensor:  # fmt: skip
    rows, (_, H, T, D) = x.shape[0], k_cache.shape
    x = x.contiguous()
    out = torch.empty(rows, H, D, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    position = number if at is None else at
    shape = {"H": H, "T": T, "D": D, "ON_DEVICE": at is not None}
    if rows > few_rows.MAX_ROWS:
        x = few_rows.rms_norm(x, norm_weight, eps)
        qkv = F.linear(x, few_rows.dequantized(weight, scale, x.dtype))
        with on(x.device):
            _rotary[(triton.cdiv(rows, ROWS), triton.cdiv(3 * H * D // 2, PAIRS))](
                qkv, rotary, position, out, k_cache, v_cache, rows,
                **shape, ROWS=ROWS, PAIRS=PAIRS, num_warps=4,
            )  # fmt: skip
        return out
    with on(x.device):
        _qkv_rotary[few_rows.grid(3 * H * D // 2)](
            x, norm_weight, weight, scale, rotary, position, out, k_cache, v_cache, rows, eps,
            **shape, **few_rows.constants(x, weight, pair=True),
        )  # fmt: skip
    return out


def _fake(x: Tensor, norm_weight, weight, scale, rotary, k_cache: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], k_cache.shape[1], k_cache.shape[3])


_library = torch.library.Library("vfmtok_fast", "FRAGMENT")
_library.define(
    "qkv_rotary_triton(Tensor x, Tensor norm_weight, Tensor weight, Tensor? scale, Tensor rotary, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? at, int number, float eps) -> Tensor"
)
_library.impl("qkv_rotary_triton", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("vfmtok_fast::qkv_rotary_triton", _fake, lib=_library)
