"""Triton `ops.linear`: cuBLAS's product with the bias in its epilogue, then exact GELU in place.

What it computes: z = x @ weight.T + bias by torch; then z/2 * (1 + erf(z / sqrt 2)) in float32,
16 bytes per thread, written over z, with a short formula for erf if z has half precision. If
gradients are needed, the result goes to new memory, because they need z. ReLU is torch's own, in
place. SwiGLU's gate is one pass over 3 N / 2 values per row without gradients, and torch's own with
them.

Bytes of the GELU for 64 x 581 rows of 4,096 in bfloat16: 305 MB read and 305 MB written, 142 us at
an H200's 4.3 TB/s. linear.md has the cost in the tokenizer.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .launch import on
from .registered import differentiable, registered

# Values and warps per program: 16-byte loads per thread in half precision, four in flight.
BLOCK, WARPS = 4096, 4
# Most values of a row in a gate's tile of BLOCK: one load of a warp in half precision.
GATE = 256
# The interpreter cannot run inline assembly.
ASM = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _reciprocal(x):
    """1 / x for x that is not subnormal; a full division would rescale first."""
    if ASM:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _normal(z, ROUNDED: tl.constexpr):
    """Standard normal CDF and density at z.

    ROUNDED: the CDF has an absolute error of 3e-7, and far below 0 a relative error of 0.2 % down
    to -5 and 1 % down to -8, where half-precision results are rounded by 0.4 %. The formula is
    Abramowitz and Stegun, 7.1.26, in units of the normal distribution. It shares the exponential
    with the density.
    """
    if ROUNDED:
        e = tl.exp2(z * z * -0.7213475204444817)
        t = _reciprocal(1.0 + 0.23164189 * tl.abs(z))
        beyond = 0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)
        beyond = e * t * (0.127414796 + t * (-0.142248368 + t * beyond))
        return tl.where(z < 0, beyond, 1.0 - beyond), e * 0.3989422804014327
    else:
        share = 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)
        return share, tl.exp(-0.5 * z * z) * 0.3989422804014327


@triton.jit
def _sigmoid(z):
    """1 / (1 + exp(-z)) in float32."""
    if ASM:
        # The denominator is at least 1, so the approximate instruction's range is enough.
        return _reciprocal(1.0 + tl.exp2(z * -1.4426950408889634))
    else:
        return tl.sigmoid(z)


@triton.jit
def _gate(z, out, rows, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """silu(z[:, :N]) * z[:, N:], with silu rounded first, as in torch."""
    # N is a constant: for an argument Triton checks only divisibility by 16, and with N = 1,368 the
    # loads would be single values.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    m = (row < rows) & (at < N)
    z += row * 2 * N + at
    gate = tl.load(z, mask=m, other=0.0).to(tl.float32)
    up = tl.load(z + N, mask=m, other=0.0)
    gate = (gate * _sigmoid(gate)).to(up.dtype).to(tl.float32)
    tl.store(out + row * N + at, gate * up.to(tl.float32), mask=m)


@triton.jit
def _gelu(z, out, numel, BLOCK: tl.constexpr, ROUNDED: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(z + at, mask=at < numel, other=0.0).to(tl.float32)
    share, _ = _normal(value, ROUNDED)
    tl.store(out + at, (value * share).to(out.dtype.element_ty), mask=at < numel)


@triton.jit
def _gelu_backward(grad, z, out, numel, BLOCK: tl.constexpr, ROUNDED: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(z + at, mask=at < numel, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=at < numel, other=0.0).to(tl.float32)
    share, density = _normal(value, ROUNDED)
    g *= share + value * density
    tl.store(out + at, g.to(out.dtype.element_ty), mask=at < numel)


def unsupported_reason(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> str | None:
    """Why this cannot take the call, or None."""
    if x.dtype not in FLOATS:
        return f"it takes float32, float16 and bfloat16, not {x.dtype}"
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """See `vfmtok_fast.ops.linear`; takes calls that `unsupported_reason` accepts."""
    z = F.linear(x, weight, bias)
    if activation is None:
        return z
    if activation == "relu":
        return z.relu_()
    if activation == "swiglu":
        if z.requires_grad:
            gate, up = z.chunk(2, dim=-1)
            return F.silu(gate) * up
        return torch.ops.vfmtok_fast.swiglu_triton(z)
    if z.requires_grad:
        return torch.ops.vfmtok_fast.gelu_triton(z)
    torch.ops.vfmtok_fast.gelu_in_place_triton(z)
    return z


def _launch(kernel, *tensors: Tensor) -> None:
    numel = tensors[-1].numel()
    if numel:
        with on(tensors[-1].device):
            kernel[(triton.cdiv(numel, BLOCK),)](
                *tensors, numel, BLOCK=BLOCK, ROUNDED=tensors[-1].itemsize == 2, num_warps=WARPS
            )


@registered(
    "swiglu_triton(Tensor z) -> Tensor",
    lambda z: z.new_empty(*z.shape[:-1], z.shape[-1] // 2),
)
def _gated(z: Tensor) -> Tensor:
    z = z.contiguous()
    N = z.shape[-1] // 2
    out = torch.empty(*z.shape[:-1], N, dtype=z.dtype, device=z.device)
    if out.numel():
        rows, width = out.numel() // N, min(GATE, triton.next_power_of_2(N))
        grid = triton.cdiv(rows, BLOCK // width), triton.cdiv(N, width)
        with on(z.device):
            _gate[grid](z, out, rows, N=N, ROWS=BLOCK // width, BLOCK=width, num_warps=WARPS)
    return out


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


differentiable("gelu_triton", _setup, _backward, without="linear")
