"""Triton `ops.linear`: cuBLAS's product with the bias in its epilogue, then exact GELU in place.

What it computes: z = x @ weight.T + bias by torch; then z/2 * (1 + erf(z / sqrt 2)), in float32, of
16 bytes a thread, over z itself; where gradients are wanted, into new memory, for they need z.
ReLU is torch's own, in place.

Bytes of the GELU for 64 x 581 rows of 4,096 in bfloat16: 305 MB read and 305 written, 142 us at an
H200's 4.3 TB/s. linear.md has the cost in the tokenizer.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import on
from .registered import library, registered

# Of a program: 16 bytes a thread of half precision, and four such loads in flight.
BLOCK, WARPS = 4096, 4
# The interpreter knows no machine code.
ASM = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)) in float32."""
    if ASM:
        # At least 1, so the plain instruction's range is enough; a division scales first.
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + tl.exp2(z * -1.4426950408889634)],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.sigmoid(z)


@triton.jit
def _share_below(z):
    """The normal distribution's share below z."""
    return 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)


@triton.jit
def _gelu(z, out, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(z + at, mask=at < numel).to(tl.float32)
    value *= _share_below(value)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < numel)


@triton.jit
def _gelu_backward(grad, z, out, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(z + at, mask=at < numel).to(tl.float32)
    g = tl.load(grad + at, mask=at < numel).to(tl.float32)
    # The density: exp(-z^2 / 2) / sqrt(2 pi).
    g *= _share_below(value) + value * tl.exp(-0.5 * value * value) * 0.3989422804014327
    tl.store(out + at, g.to(out.dtype.element_ty), mask=at < numel)


def unsupported_reason(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> str | None:
    """Why this cannot take the call, or None."""
    if x.dtype not in FLOATS:
        return f"it takes float32, float16 and bfloat16, not {x.dtype}"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """See `vfmtok_fast.ops.linear`; takes what `unsupported_reason` lets pass."""
    z = F.linear(x, weight, bias)
    if activation is None:
        return z
    if activation == "relu":
        return z.relu_()
    if z.requires_grad:
        return torch.ops.vfmtok_fast.gelu_triton(z)
    torch.ops.vfmtok_fast.gelu_in_place_triton(z)
    return z


def _launch(kernel, *tensors: Tensor) -> None:
    numel = tensors[-1].numel()
    if numel:
        with on(tensors[-1].device):
            kernel[(triton.cdiv(numel, BLOCK),)](*tensors, numel, BLOCK=BLOCK, num_warps=WARPS)


@registered("gelu_in_place_triton(Tensor(a!) z) -> ()")
def _in_place(z: Tensor) -> None:
    _launch(_gelu, z, z)


@registered("gelu_triton(Tensor z) -> Tensor", lambda z: z.new_empty(z.shape))
def _out_of_place(z: Tensor) -> Tensor:
    z = z.contiguous()
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    _launch(_gelu, z, out)
    return out


@registered(
    "gelu_triton_backward(Tensor grad, Tensor z) -> Tensor", lambda grad, z: z.new_empty(z.shape)
)
def _launch_backward(grad: Tensor, z: Tensor) -> Tensor:
    grad, z = grad.contiguous(), z.contiguous()
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    _launch(_gelu_backward, grad, z, out)
    return out


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad: Tensor) -> Tensor:
    return torch.ops.vfmtok_fast.gelu_triton_backward(grad, *ctx.saved_tensors)


def _no_second_derivative(ctx, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "linear: its Triton kernels have first derivatives only; "
        "leave this op out of enable(ops=...)"
    )


torch.library.register_autograd(
    "vfmtok_fast::gelu_triton", _backward, setup_context=_setup, lib=library
)
# Left out, torch would take its derivative for zero.
torch.library.register_autograd(
    "vfmtok_fast::gelu_triton_backward", _no_second_derivative, lib=library
)
