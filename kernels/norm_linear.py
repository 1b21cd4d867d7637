"""Triton `ops.norm_linear`: RMSNorm and the product with the head in one launch, float32 out.

out[r, n] = sum over k of RMSNorm(x)[r, k] * weight[n, k]. Bytes: the weight's, 2 V C in half
precision, 33.6 MB for GPT-L; `few_rows` has the loop, decode_step.md what was measured. Above
`few_rows.MAX_ROWS` rows cuBLAS makes the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import few_rows
from .few_rows import _products, _store, _tile
from .launch import on

SPACES = (few_rows.PRODUCTS,)


@triton.jit(do_not_specialize=["rows"])
def _norm_linear(
    x, norm, weight, scale, out, rows, N, eps,
    K: tl.constexpr, P: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    o_n, m_n = _tile(N)
    total, _ = _products(
        x, norm, weight, weight, scale, scale, o_n, o_n, m_n, rows, eps,
        K, P, DEPTH, STAGES, True, False, OVERLAP,
    )  # fmt: skip
    _store(out, o_n, m_n, rows, N, total, P)


def unsupported_reason(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> str | None:
    """Why this cannot take the call, or None."""
    return few_rows.unsupported_reason(x, norm_weight, weight, scale)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See `vfmtok_fast.ops.norm_linear`; takes what `unsupported_reason` lets pass."""
    return torch.ops.vfmtok_fast.norm_linear_triton(x, norm_weight, weight, scale, eps)


def _launch(
    x: Tensor, norm_weight: Tensor, weight: Tensor, scale: Tensor | None, eps: float
) -> Tensor:
    rows, N = x.shape[0], weight.shape[0]
    x = x.contiguous()
    if rows > few_rows.MAX_ROWS:
        x = few_rows.rms_norm(x, norm_weight, eps)
        weight = few_rows.dequantized(weight, scale, x.dtype)
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, weight.T, out_dtype=torch.float32)
        return torch.mm(x, weight.T).float()
    out = torch.empty(rows, N, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    with on(x.device):
        _norm_linear[few_rows.grid(N)](
            x, norm_weight, weight, scale, out, rows, N, eps,
            **few_rows.constants(x, weight, pair=False),
        )  # fmt: skip
    return out


def _fake(x: Tensor, norm_weight: Tensor, weight: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


_library = torch.library.Library("vfmtok_fast", "FRAGMENT")
_library.define(
    "norm_linear_triton(Tensor x, Tensor norm_weight, Tensor weight, Tensor? scale, float eps) "
    "-> Tensor"
)
_library.impl("norm_linear_triton", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("vfmtok_fast::norm_linear_triton", _fake, lib=_library)
