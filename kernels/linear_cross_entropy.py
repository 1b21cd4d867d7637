"""Triton `ops.linear_cross_entropy`: turns logits into gradients between cuBLAS products.

What it computes: rows are processed in chunks of CHUNK_BYTES of logits z [rows, V] = x @ weight.T
(cuBLAS). One program per row computes the maximum m, the sum of exp(z - m) and the loss
log(sum) - (z_target - m), and writes softmax(z) - target over z, in place. From these cuBLAS
computes the gradients of x and of weight; the latter accumulates in float32 over the chunks. If the
loss is reduced, all of this happens in the forward pass, and the backward pass only scales, with
one read and one write. With reduction "none" the backward pass recomputes the logits, and each row
has its own factor.

Bytes besides the products, for N = 32,768 rows, C = 1,024, V = 16,384 in bfloat16: the kernel reads
and writes the logits once, 2.1 GB, 0.50 ms at an H200's 4.3 TB/s, and a chunk of 128 MiB is not
much larger than its cache; 8 sums of 67 MB are read and written. linear_cross_entropy.md has the
rest.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..functional import factor, head_in_chunks, reduced
from .launch import on
from .registered import differentiable, registered

# Bytes of logits in memory at a time: 4,096 rows of 16,384 in half precision are enough for full
# waves of a product's tiles. Not measured.
CHUNK_BYTES = 2**27
# A row of up to this many logits is read once and held in registers, 32 per thread.
HELD_LOGITS = 16384
# Values and warps per program of the scaling kernel; see linear.py.
BLOCK, WARPS = 4096, 4
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def _cross_entropy(
    logits, targets, grad, losses, V, ignore_index, smoothing,
    BLOCK: tl.constexpr, HELD: tl.constexpr, SMOOTHED: tl.constexpr, WEIGHTED: tl.constexpr,
    WRITE: tl.constexpr,
):  # fmt: skip
    """Compute a row's loss and overwrite its logits with their gradient, times ``grad``."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    o_v = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if WRITE:
            for first in range(0, V, BLOCK):
                zeros = tl.zeros((BLOCK,), logits.dtype.element_ty)
                tl.store(logits + first + o_v, zeros, mask=first + o_v < V)
    else:
        inside = (target >= 0) & (target < V)
        # A target that is not a code gives NaN.
        z_target = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
        below = 0.0
        if HELD:
            m_v = o_v < V
            z = tl.load(logits + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
            most = tl.max(z, axis=0)
            e = tl.exp(z - most)
            total = tl.sum(e, axis=0)
            if SMOOTHED:
                below = tl.sum(tl.where(m_v, z - most, 0.0), axis=0)
        else:
            top = tl.full((BLOCK,), float("-inf"), tl.float32)
            for first in range(0, V, BLOCK):
                m_v = first + o_v < V
                z = tl.load(logits + first + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
                top = tl.maximum(top, z)
            most = tl.max(top, axis=0)
            sums, away = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
            for first in range(0, V, BLOCK):
                m_v = first + o_v < V
                z = tl.load(logits + first + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
                sums += tl.exp(z - most)
                if SMOOTHED:
                    away += tl.where(m_v, z - most, 0.0)
            total = tl.sum(sums, axis=0)
            below = tl.sum(away, axis=0)
        log_total = tl.log(total)
        loss = log_total - (z_target - most)
        at_target = 1.0
        spread = 0.0
        if SMOOTHED:
            at_target = 1.0 - smoothing
            spread = smoothing / V
            loss = at_target * loss + smoothing * log_total - spread * below
        tl.store(losses + row, loss)
        if WRITE:
            by = tl.where(inside, 1.0, float("nan"))
            if WEIGHTED:
                by *= tl.load(grad + row).to(tl.float32)
            scale, spread = by / total, by * spread
            if HELD:
                g = e * scale - spread
                tl.store(logits + o_v, g.to(logits.dtype.element_ty), mask=o_v < V)
            else:
                for first in range(0, V, BLOCK):
                    m_v = first + o_v < V
                    z = tl.load(logits + first + o_v, mask=m_v, other=0.0).to(tl.float32)
                    g = tl.exp(z - most) * scale - spread
                    tl.store(logits + first + o_v, g.to(logits.dtype.element_ty), mask=m_v)
            # Write the target's entry again instead of comparing every logit with the target.
            tl.debug_barrier()
            g = tl.exp(z_target - most) * scale - spread - by * at_target
            tl.store(logits + target, g.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _scale(x, by, out, numel, BLOCK: tl.constexpr):
    """Multiply by a factor in float32; torch would round the factor to the dtype of x."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < numel).to(tl.float32) * tl.load(by)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < numel)


def unsupported_reason(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, reduction: str,
) -> str | None:  # fmt: skip
    """Why this cannot take the call, or None."""
    if x.dtype not in FLOATS:
        return f"it takes float32, float16 and bfloat16, not {x.dtype}"
    return None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, reduction: str,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.linear_cross_entropy`; takes calls that `unsupported_reason` accepts."""
    # Each unreduced loss has its own gradient, which is not known yet.
    learns = torch.is_grad_enabled() and reduction != "none"
    wanted = [learns and part is not None and part.requires_grad for part in (x, weight, bias)]
    return torch.ops.vfmtok_fast.linear_cross_entropy_triton(
        x, weight, targets, bias, ignore_index, label_smoothing, reduction, wanted
    )[0]


def _turn(
    logits: Tensor, targets: Tensor, grad: Tensor | None, losses: Tensor,
    *, ignore_index: int, smoothing: float, write: bool,
) -> None:  # fmt: skip
    V = logits.shape[1]
    block = min(triton.next_power_of_2(V), HELD_LOGITS)
    with on(logits.device):
        _cross_entropy[(logits.shape[0],)](
            logits, targets, losses if grad is None else grad, losses, V, ignore_index, smoothing,
            BLOCK=block, HELD=V <= HELD_LOGITS, SMOOTHED=smoothing > 0, WEIGHTED=grad is not None,
            WRITE=write, num_warps=max(1, block // 1024),
        )  # fmt: skip


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == sums.dtype:
        sums.addmm_(a, b)
    elif a.device.type == "cuda":
        # Half-precision operands with a float32 result that is never rounded to half precision.
        torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
    else:
        sums.addmm_(a.to(sums.dtype), b.to(sums.dtype))


def _chunks(x, weight, targets, bias, grad, ignore_index, smoothing, wanted):
    x, weight, targets = x.contiguous(), weight.contiguous(), targets.contiguous()
    turn = functools.partial(
        _turn, ignore_index=ignore_index, smoothing=smoothing, write=any(wanted)
    )
    with torch.autocast(x.device.type, enabled=False):
        return head_in_chunks(
            x, weight, targets, bias, grad, wanted, CHUNK_BYTES, turn, _add_product
        )


def _like_gradients(x, weight, bias, wanted: Sequence[bool], wide: torch.dtype | None = None):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    dtypes = (x.dtype, wide or x.dtype, wide or x.dtype)
    return tuple(
        x.new_empty(shape if asked else (0,), dtype=dtype)
        for shape, dtype, asked in zip(shapes, dtypes, wanted, strict=True)
    )


def _like(x, weight, targets, bias, ignore_index, smoothing, reduction: str, wanted):
    loss = x.new_empty(x.shape[:1] if reduction == "none" else (), dtype=torch.float32)
    return loss, *_like_gradients(x, weight, bias, wanted, torch.float32)


@registered(
    "linear_cross_entropy_triton(Tensor x, Tensor weight, Tensor targets, Tensor? bias, "
    "int ignore_index, float smoothing, str reduction, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _like,
)
def _forward(x, weight, targets, bias, ignore_index, smoothing, reduction, wanted):
    """Return the loss and the gradients of the summed losses; weight's and bias's in float32."""
    losses, *by = _chunks(x, weight, targets, bias, None, ignore_index, smoothing, wanted)
    return reduced(losses, targets, ignore_index, reduction), *by


@registered(
    "linear_cross_entropy_triton_again(Tensor grad, Tensor x, Tensor weight, Tensor targets, "
    "Tensor? bias, int ignore_index, float smoothing, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    lambda grad, x, weight, targets, bias, ignore, smoothing, wanted: _like_gradients(
        x, weight, bias, wanted
    ),
)
def _again(grad, x, weight, targets, bias, ignore_index, smoothing, wanted):
    """Return the gradients of the rows' losses, weighted by ``grad``."""
    made = _chunks(x, weight, targets, bias, grad.contiguous(), ignore_index, smoothing, wanted)
    return tuple(one.to(x.dtype) for one in made[1:])


@registered(
    "linear_cross_entropy_triton_scale(Tensor x, Tensor by, ScalarType dtype) -> Tensor",
    lambda x, by, dtype: x.new_empty(x.shape, dtype=dtype),
)
def _scaled(x: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if numel := x.numel():
        with on(x.device):
            _scale[(triton.cdiv(numel, BLOCK),)](x, by, out, numel, BLOCK=BLOCK, num_warps=WARPS)
    return out


def _setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, targets, bias, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype = x.dtype
    late = ctx.options[2] == "none"
    ctx.save_for_backward(targets, *((x, weight, bias) if late else output[1:]))


def _backward(ctx, grad: Tensor, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    ignore_index, smoothing, reduction, _ = ctx.options
    targets, *saved = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    if reduction == "none":
        x, weight, bias = saved
        made = torch.ops.vfmtok_fast.linear_cross_entropy_triton_again(
            grad, x, weight, targets, bias, ignore_index, smoothing, wanted
        )
    else:
        by = factor(grad, targets, ignore_index, reduction)
        scale = torch.ops.vfmtok_fast.linear_cross_entropy_triton_scale
        made = [
            scale(one, by, ctx.dtype) if asked else None
            for one, asked in zip(saved, wanted, strict=True)
        ]
    x, weight, bias = (one if asked else None for one, asked in zip(made, wanted, strict=True))
    return x, weight, None, bias, None, None, None, None


differentiable("linear_cross_entropy_triton", _setup, _backward, without="linear_cross_entropy")
