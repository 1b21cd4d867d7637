"""Triton `ops.gate_up`: RMSNorm, both products and SwiGLU's gate in one launch.

out[r, n] = silu(g) * u with g and u = sum over k of RMSNorm(x)[r, k] * w[n, k] for the weights of
gate and up. Bytes: both weights', 4 F C in half precision; `few_rows` has the loop,
decode_step.md what was measured. Above `few_rows.MAX_ROWS` rows cuBLAS makes the products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import few_rows
from .few_rows import _products, _store, _tile
from .launch import on

SPACES = (few_rows.PRODUCTS,)

BLOCK = 1024


@triton.jit
def _gated(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit(do_not_specialize=["rows"])
def _gate_up(
    x, norm, gate, up, gate_scale, up_scale, out, rows, N, eps,
    K: tl.constexpr, P: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    o_n, m_n = _tile(N)
    g, u = _products(
        x, norm, gate, up, gate_scale, up_scale, o_n, o_n, m_n, rows, eps,
        K, P, DEPTH, STAGES, True, True, OVERLAP,
    )  # fmt: skip
    _store(out, o_n, m_n, rows, N, _gated(g, u), P)


@triton.jit
def _gate(gate, up, out, count, BLOCK: tl.constexpr):
    """The gate alone, of products that are there already."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    g = tl.load(gate + o, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + o, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + o, _gated(g, u).to(out.dtype.element_ty), mask=mask)


def unsupported_reason(
    x: Tensor,
    norm_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    *,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    eps: float = 1e-5,
) -> str | None:
    """Why this cannot take the call, or None."""
    return few_rows.unsupported_reason(x, norm_weight, gate_weight, up_weight, gate_scale, up_scale)


def gate_up(
    x: Tensor,
    norm_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    *,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See `vfmtok_fast.ops.gate_up`; takes what `unsupported_reason` lets pass."""
    return torch.ops.vfmtok_fast.gate_up_triton(
        x, norm_weight, gate_weight, up_weight, gate_scale, up_scale, eps
    )


def _launch(
    x: Tensor, norm_weight: Tensor, gate: Tensor, up: Tensor, gate_scale: Tensor | None,
    up_scale: Tensor | None, eps: float,
) -> Tensor:  # fmt: skip
    rows, N = x.shape[0], gate.shape[0]
    x = x.contiguous()
    out = torch.empty(rows, N, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if rows > few_rows.MAX_ROWS:
        x = few_rows.rms_norm(x, norm_weight, eps)
        products = [
            F.linear(x, few_rows.dequantized(weight, scale, x.dtype))
            for weight, scale in ((gate, gate_scale), (up, up_scale))
        ]
        with on(x.device):
            _gate[(triton.cdiv(out.numel(), BLOCK),)](
                *products, out, out.numel(), BLOCK=BLOCK, num_warps=4
            )
        return out
    with on(x.device):
        _gate_up[few_rows.grid(N)](
            x, norm_weight, gate, up, gate_scale, up_scale, out, rows, N, eps,
            **few_rows.constants(x, gate, pair=True),
        )  # fmt: skip
    return out


def _fake(x: Tensor, norm_weight: Tensor, gate: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape[0], gate.shape[0])


_library = torch.library.Library("vfmtok_fast", "FRAGMENT")
_library.define(
    "gate_up_triton(Tensor x, Tensor norm_weight, Tensor gate, Tensor up, Tensor? gate_scale, "
    "Tensor? up_scale, float eps) -> Tensor"
)
_library.impl("gate_up_triton", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("vfmtok_fast::gate_up_triton", _fake, lib=_library)
