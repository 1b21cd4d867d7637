"""Triton `ops.linear_residual`: a product of a few rows, added to the residual in float32.

out[r, n] = residual[r, n] + sum over k of x[r, k] * weight[n, k]. Bytes: the weight's, 2 N K in
half precision; `few_rows` has the loop, decode_step.md what was measured. Above `few_rows.MAX_ROWS`
rows cuBLAS does both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import few_rows
from .few_rows import _products, _tile
from .launch import on

SPACES = (few_rows.PRODUCTS,)


@triton.jit(do_not_specialize=["rows"])
def _linear_residual(
    x, weight, scale, residual, out, rows, N,
    K: tl.constexpr, P: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    o_n, m_n = _tile(N)
    total, _ = _products(
        x, x, weight, weight, scale, scale, o_n, o_n, m_n, rows, 0.0,
        K, P, DEPTH, STAGES, False, False, OVERLAP,
    )  # fmt: skip
    o_r = tl.arange(0, P)
    at = o_r.to(tl.int64)[None, :] * N + o_n[:, None]
    mask = m_n[:, None] & (o_r < rows)[None, :]
    total += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def unsupported_reason(
    x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None
) -> str | None:
    """Why this cannot take the call, or None."""
    return few_rows.unsupported_reason(x, weight, scale) or (
        few_rows.unsupported_reason(residual) and "its residual needs a gradient"
    )


def linear_residual(
    x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    """See `vfmtok_fast.ops.linear_residual`; takes what `unsupported_reason` lets pass."""
    return torch.ops.vfmtok_fast.linear_residual_triton(x, weight, residual, scale)


def _launch(x: Tensor, weight: Tensor, residual: Tensor, scale: Tensor | None) -> Tensor:
    rows, N = x.shape[0], weight.shape[0]
    if rows > few_rows.MAX_ROWS:
        return torch.addmm(residual, x, few_rows.dequantized(weight, scale, x.dtype).T)
    x, residual = x.contiguous(), residual.contiguous()
    out = torch.empty(rows, N, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    with on(x.device):
        _linear_residual[few_rows.grid(N)](
            x, weight, scale, residual, out, rows, N, **few_rows.constants(x, weight, pair=False)
        )
    return out


def _fake(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_library = torch.library.Library("vfmtok_fast", "FRAGMENT")
_library.define(
    "linear_residual_triton(Tensor x, Tensor weight, Tensor residual, Tensor? scale) -> Tensor"
)
_library.impl("linear_residual_triton", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("vfmtok_fast::linear_residual_triton", _fake, lib=_library)
