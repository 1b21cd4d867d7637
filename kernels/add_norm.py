"""Triton `ops.add_norm`: scale, addition and LayerNorm in one pass over the rows.

What it computes: s = x + scale * branch [C] for each row, rounded to the stream's dtype and stored;
mean and variance of s in float32 registers; n = (s - mean) * rstd * weight + bias.

Bytes for 64 x 581 rows of 1,024 in bfloat16: x and branch in, s and n out, 305 MB, so 71 us at an
H200's 4.3 TB/s. add_norm.md has the backward pass and the cost in the tokenizer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on
from .registered import differentiable, registered

# A row is held in registers, 16 numbers per thread with 16 warps.
MOST_CHANNELS = 8192
# Programs of the backward pass, and thus partial sums per column: four per multiprocessor of an
# H200. The number is the same on every card, so that bits do not depend on the card.
PARTS = 528
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _row(base, row, o_c, m_c, C: tl.constexpr):
    return tl.load(base + row * C + o_c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _normalise(s, m_c, eps, C: tl.constexpr):
    """Normalise s in two passes over registers, so that a large mean costs no precision."""
    centred = tl.where(m_c, s - tl.sum(s, axis=0) / C, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / C + eps)
    return centred * rstd, rstd


@triton.jit
def _add_norm(
    x, branch, weight, bias, scale, total, normed, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b = _row(branch, row, o_c, m_c, C)
    if SCALED:
        b *= tl.load(scale + o_c, mask=m_c, other=0.0).to(tl.float32)
    s = (_row(x, row, o_c, m_c, C) + b).to(total.dtype.element_ty)
    at = row * C + o_c
    tl.store(total + at, s, mask=m_c)
    n, _ = _normalise(s.to(tl.float32), m_c, eps, C)
    w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    n = n * w + tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(normed + at, n.to(normed.dtype.element_ty), mask=m_c)


@triton.jit
def _add_norm_backward(
    by_total, by_normed, total, branch, weight, scale, by_x, by_branch, sums, eps, rows,
    C: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Process every ``num_programs``-th row.

    ``sums`` [programs, 3, C]: partial gradients of weight, bias and scale.
    """
    part = tl.program_id(0)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    w = tl.load(weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    by_weight = tl.zeros((BLOCK,), tl.float32)
    by_bias = tl.zeros((BLOCK,), tl.float32)
    by_scale = tl.zeros((BLOCK,), tl.float32)
    if SCALED:
        factor = tl.load(scale + o_c, mask=m_c, other=0.0).to(tl.float32)
    parts = tl.num_programs(0)
    for turn in range(tl.cdiv(rows - part, parts)):
        row = part.to(tl.int64) + turn * parts
        n, rstd = _normalise(_row(total, row, o_c, m_c, C), m_c, eps, C)
        g = _row(by_normed, row, o_c, m_c, C)
        by_weight += g * n
        by_bias += g
        g *= w
        along = tl.sum(g * n, axis=0) / C
        s = (g - tl.sum(g, axis=0) / C - n * along) * rstd + _row(by_total, row, o_c, m_c, C)
        at = row * C + o_c
        tl.store(by_x + at, s.to(by_x.dtype.element_ty), mask=m_c)
        if SCALED:
            by_scale += s * _row(branch, row, o_c, m_c, C)
            s *= factor
        tl.store(by_branch + at, s.to(by_branch.dtype.element_ty), mask=m_c)
    out = sums + part * 3 * C + o_c
    tl.store(out, by_weight, mask=m_c)
    tl.store(out + C, by_bias, mask=m_c)
    tl.store(out + 2 * C, by_scale, mask=m_c)


def unsupported_reason(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor,
    scale: Tensor | None, eps: float, dtype: torch.dtype,
) -> str | None:  # fmt: skip
    """Why this cannot take the call, or None."""
    given = (x.dtype, branch.dtype, weight.dtype, dtype, x.dtype if scale is None else scale.dtype)
    if others := [str(one) for one in given if one not in FLOATS]:
        return f"it takes float32, float16 and bfloat16, not {others[0]}"
    if x.shape[-1] > MOST_CHANNELS:
        return f"it takes at most {MOST_CHANNELS} channels, not {x.shape[-1]}"
    return None


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor,
    scale: Tensor | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `vfmtok_fast.ops.add_norm`; takes calls that `unsupported_reason` accepts."""
    return torch.ops.vfmtok_fast.add_norm_triton(x, branch, weight, bias, scale, eps, dtype)


def _constants(C: int) -> dict[str, int]:
    block = triton.next_power_of_2(C)
    # Eight numbers per thread are one 16-byte load in half precision; the widest rows have 16.
    return {"C": C, "BLOCK": block, "num_warps": max(1, min(16, block // 256))}


def _like(x, branch, weight, bias, scale, eps: float, dtype: torch.dtype):
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype)


@registered(
    "add_norm_triton(Tensor x, Tensor branch, Tensor weight, Tensor bias, Tensor? scale, "
    "float eps, ScalarType dtype) -> (Tensor, Tensor)",
    _like,
)
def _forward(x, branch, weight, bias, scale, eps: float, dtype: torch.dtype):
    x, branch, weight, bias = (part.contiguous() for part in (x, branch, weight, bias))
    scaled = scale is not None
    scale = scale.contiguous() if scaled else weight
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = torch.empty(x.shape, dtype=dtype, device=x.device)
    C = x.shape[-1]
    if x.numel():
        with on(x.device):
            _add_norm[(x.numel() // C,)](
                x, branch, weight, bias, scale, total, normed, eps, SCALED=scaled, **_constants(C)
            )
    return total, normed


def _like_backward(by_total, by_normed, total, branch, weight, scale, eps: float):
    sums = total.new_empty(3, total.shape[-1], dtype=torch.float32)
    return total.new_empty(total.shape), branch.new_empty(branch.shape), sums


@registered(
    "add_norm_triton_backward(Tensor by_total, Tensor by_normed, Tensor total, Tensor branch, "
    "Tensor weight, Tensor? scale, float eps) -> (Tensor, Tensor, Tensor)",
    _like_backward,
)
def _launch_backward(by_total, by_normed, total, branch, weight, scale, eps: float):
    by_total, by_normed, branch = (x.contiguous() for x in (by_total, by_normed, branch))
    weight, scaled = weight.contiguous(), scale is not None
    scale = scale.contiguous() if scaled else weight
    C, device = total.shape[-1], total.device
    by_x = torch.empty(total.shape, dtype=total.dtype, device=device)
    by_branch = torch.empty(branch.shape, dtype=branch.dtype, device=device)
    rows = total.numel() // C
    if not rows:
        return by_x, by_branch, torch.zeros(3, C, dtype=torch.float32, device=device)
    parts = min(PARTS, rows)
    sums = torch.empty(parts, 3, C, dtype=torch.float32, device=device)
    with on(device):
        _add_norm_backward[(parts,)](
            by_total, by_normed, total, branch, weight, scale, by_x, by_branch, sums, eps, rows,
            SCALED=scaled, **_constants(C),
            # With one channel, a product and its own mean must be rounded alike to cancel.
            enable_fp_fusion=False,
        )  # fmt: skip
    return by_x, by_branch, sums.sum(0)


def _setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, branch, weight, bias, scale, ctx.eps, _ = inputs
    ctx.dtypes = weight.dtype, bias.dtype
    ctx.save_for_backward(output[0], branch, weight, scale)


def _backward(ctx, by_total: Tensor, by_normed: Tensor) -> tuple[Tensor | None, ...]:
    total, branch, weight, scale = ctx.saved_tensors
    by_x, by_branch, sums = torch.ops.vfmtok_fast.add_norm_triton_backward(
        by_total, by_normed, total, branch, weight, scale, ctx.eps
    )
    by_weight, by_bias, by_scale = sums.unbind(0)
    by_scale = None if scale is None else by_scale.to(scale.dtype)
    by_weight, by_bias = by_weight.to(ctx.dtypes[0]), by_bias.to(ctx.dtypes[1])
    return by_x, by_branch, by_weight, by_bias, by_scale, None, None


differentiable("add_norm_triton", _setup, _backward, without="add_norm")
