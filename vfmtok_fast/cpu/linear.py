"""`ops.linear` on a CPU: a oneDNN product with fused bias and GELU.

torch sends a float32 product to MKL, which is slower on processors that are not Intel's. Measured
on 2 cores of an AMD EPYC, torch 2.14, candidate and baseline in turn, medians: float32 is 1.14 to
1.54 times as fast at the ViT's shapes (2,324 rows), 1.8 to 2.1 at the region encoder's (1,024
rows); bfloat16 is 1.07 to 1.5, and 2. No shape of the models was slower, so there is no threshold.

ReLU follows in place, because oneDNN's own turns NaN into 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import first_derivatives_only

# Checked here, because torch.compile cannot look into these.
AVAILABLE = torch.backends.mkldnn.is_available()
ONCE = "linear: its CPU code has first derivatives only; leave linear out of enable(ops=...)"
BFLOAT16 = AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def unsupported_reason(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> str | None:
    """Why this cannot take the call, or None."""
    if not AVAILABLE:
        return "this torch was built without oneDNN"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {x.dtype}"
    if x.dtype == torch.bfloat16 and not BFLOAT16:
        return "this processor has no instructions for bfloat16"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """See `vfmtok_fast.ops.linear`; takes calls that `unsupported_reason` accepts."""
    if activation == "swiglu":
        gate, up = linear(x, weight, bias, None).chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up
    if torch.is_grad_enabled() and any(
        part is not None and part.requires_grad for part in (x, weight, bias)
    ):
        return _Linear.apply(x, weight, bias, activation)
    y = _product(x, weight, bias, "gelu" if activation == "gelu" else "none")
    return y.relu_() if activation == "relu" else y


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    # oneDNN does not accept empty tensors. Inductor's lowering does not accept weights that are not
    # constants; under torch.compile, inductor chooses for itself.
    if 0 in x.shape or 0 in weight.shape or torch.compiler.is_compiling():
        y = x @ weight.T if bias is None else x @ weight.T + bias
        return torch.nn.functional.gelu(y) if activation == "gelu" else y
    # oneDNN assumes that all three are contiguous, without checking.
    bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), weight.contiguous(), bias, activation, [], "none"
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None):
        y = _product(x, weight, bias)
        ctx.activation, ctx.biased = activation, bias is not None
        out = y
        if activation == "gelu":
            out = torch.nn.functional.gelu(y)
        elif activation == "relu":
            out = y = y.relu_()
        ctx.save_for_backward(x, weight, None if activation is None else y)
        return out

    @staticmethod
    @first_derivatives_only(ONCE)
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        if ctx.activation == "gelu":
            grad = torch.ops.aten.gelu_backward(grad, y)
        elif ctx.activation == "relu":
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        rows = grad.reshape(-1, grad.shape[-1])
        by_x = by_weight = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = _product(grad, weight.T, None)
        if ctx.needs_input_grad[1]:
            by_weight = _product(rows.T, x.reshape(-1, x.shape[-1]).T, None)
        if ctx.biased and ctx.needs_input_grad[2]:
            by_bias = rows.sum(0)
        return by_x, by_weight, by_bias, None
