"""`ops.linear_cross_entropy` on a CPU: the logits of a few rows at a time.

If gradients are wanted and the losses are reduced, the forward pass computes them from its logits,
for an output gradient of 1, and the backward pass scales them. With reduction "none", the backward
pass recomputes the logits. The gradient of ``weight`` is summed in float32. If all logits fit into
one chunk, torch's own function is used, because there is nothing to save.

Measured on 2 cores that were also busy otherwise, torch 2.14, in turns, best of 5, 2,048 rows of
768 and 16,384 codes in bfloat16, forward and backward: 1.28 s for the reference, 1.31 s with chunks
of 64 MiB, 1.35 with 32, 1.42 with 16, 1.63 with 8.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import factor, first_derivatives_only, head_in_chunks, reduced

CHUNK_BYTES = 2**26
ONCE = (
    "linear_cross_entropy: its CPU code has first derivatives only; leave it out of enable(ops=...)"
)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, reduction: str,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.linear_cross_entropy`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.shape[0] * weight.shape[0] * wide.itemsize <= CHUNK_BYTES:
        return F.cross_entropy(
            F.linear(x, weight, bias).to(wide), targets, ignore_index=ignore_index,
            label_smoothing=label_smoothing, reduction=reduction,
        )  # fmt: skip
    learns = torch.is_grad_enabled()
    wanted = tuple(learns and part is not None and part.requires_grad for part in (x, weight, bias))
    args = (x, weight, targets, bias, ignore_index, label_smoothing, reduction)
    return _Loss.apply(*args, wanted)


def _turn(
    logits: Tensor, targets: Tensor, grad: Tensor | None, losses: Tensor,
    *, ignore_index: int, smoothing: float, write: bool,
) -> None:  # fmt: skip
    """Write the losses of some rows and, if ``write``, their gradients over the logits."""
    shares = torch.log_softmax(logits, -1, dtype=losses.dtype)
    ignored = targets == ignore_index
    at = targets.masked_fill(ignored, 0)[:, None]
    loss = shares.gather(1, at)[:, 0] * (smoothing - 1)
    if smoothing:
        loss -= shares.mean(-1) * smoothing
    losses.copy_(loss.masked_fill_(ignored, 0))
    if not write:
        return
    shares.exp_()
    if smoothing:
        shares -= smoothing / shares.shape[1]
    shares.scatter_add_(1, at, (smoothing - 1) * torch.ones_like(at, dtype=shares.dtype))
    by = (~ignored).to(shares.dtype) if grad is None else grad.masked_fill(ignored, 0)
    torch.mul(shares, by[:, None], out=logits)


def _add_product(sums: Tensor, a: Tensor, b: Tensor) -> None:
    # A product in half precision is rounded once per chunk.
    sums.addmm_(a, b) if a.dtype == sums.dtype else sums.add_(a @ b)


def _chunks(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, grad: Tensor | None,
    ignore_index: int, smoothing: float, wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    turn = functools.partial(
        _turn, ignore_index=ignore_index, smoothing=smoothing, write=any(wanted)
    )
    with torch.autocast("cpu", enabled=False):
        return head_in_chunks(
            x, weight, targets, bias, grad, wanted, CHUNK_BYTES, turn, _add_product
        )


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, bias, ignore_index, smoothing, reduction, wanted):
        ctx.options = ignore_index, smoothing, reduction, wanted
        late = reduction == "none"
        made = _chunks(
            x, weight, targets, bias, None, ignore_index, smoothing,
            (False, False, False) if late else wanted,
        )  # fmt: skip
        if late:
            ctx.save_for_backward(targets, x, weight, bias)
        else:
            ctx.save_for_backward(targets, *made[1:])
            ctx.dtype = x.dtype
        return reduced(made[0], targets, ignore_index, reduction)

    @staticmethod
    @first_derivatives_only(ONCE)
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        ignore_index, smoothing, reduction, wanted = ctx.options
        targets, *saved = ctx.saved_tensors
        if reduction == "none":
            x, weight, bias = saved
            made = _chunks(x, weight, targets, bias, grad, ignore_index, smoothing, wanted)[1:]
            dtype = x.dtype
        else:
            by, dtype = factor(grad, targets, ignore_index, reduction), ctx.dtype
            made = [one.to(by.dtype) * by for one in saved]
        x, weight, bias = (
            one.to(dtype) if asked else None for one, asked in zip(made, wanted, strict=True)
        )
        return x, weight, None, bias, None, None, None, None
