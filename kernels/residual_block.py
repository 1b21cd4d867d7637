"""Triton `ops.residual_block`: cuDNN's convolutions between the kernels of `group_norm_silu`.

What it computes: x + conv2(silu(norm2(conv1(silu(norm1(x)))))), x and all between channels last.
PyTorch adds a convolution's bias by a pass of its own. Here the first one's goes into the norm that
follows, where it costs nothing, and the second one's into the addition of x, a pass anyway.

Passes over a map of O channels beside the convolutions: 3 and 3 for the norms, 3 for the sum; ATen
makes 3 + 2 for each norm and SiLU, 2 for each bias and 3 for the sum. group_norm_silu.md has the
prediction for a decode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .group_norm_silu import norm_silu, unsupported_map
from .launch import on
from .registered import registered

Pair = tuple[Tensor, Tensor]
# Values of a program: 16 bytes of bfloat16 for each of 256 threads.
BLOCK = 2048


@triton.jit
def _add(h, x, bias, count, C, BLOCK: tl.constexpr):
    """h += bias of its channel + x, all channels last."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = at < count
    b = tl.load(bias + at % C, mask=m, other=0.0)
    v = tl.load(h + at, mask=m, other=0.0)
    # Rounded between the two, as the convolution's result is.
    v = (v.to(tl.float32) + b.to(tl.float32)).to(v.dtype)
    v = v.to(tl.float32) + tl.load(x + at, mask=m, other=0.0).to(tl.float32)
    tl.store(h + at, v, mask=m)


def _add_in_place(h: Tensor, x: Tensor, bias: Tensor) -> None:
    if h.numel():
        with on(h.device):
            grid = (triton.cdiv(h.numel(), BLOCK),)
            _add[grid](h, x, bias.contiguous(), h.numel(), h.shape[1], BLOCK=BLOCK, num_warps=8)


_add_op = registered("residual_add_triton(Tensor(a!) h, Tensor x, Tensor bias) -> ()")(
    _add_in_place
)


def unsupported_reason(
    x: Tensor, norm1: Pair, conv1: Pair, norm2: Pair, conv2: Pair, shortcut: Pair | None,
    num_groups: int, eps: float,
) -> str | None:  # fmt: skip
    """Why this cannot take the call, or None."""
    return unsupported_map(x, conv1[0].shape[0])


def residual_block(
    x: Tensor, norm1: Pair, conv1: Pair, norm2: Pair, conv2: Pair, shortcut: Pair | None,
    num_groups: int, eps: float,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.residual_block`; takes what `unsupported_reason` lets pass."""
    x = _last(x)
    h = _last(F.conv2d(norm_silu(x, None, *norm1, num_groups, eps), conv1[0], padding=1))
    h = norm_silu(h, conv1[1], *norm2, num_groups, eps)
    if torch.is_grad_enabled() and (h.requires_grad or conv2[0].requires_grad):
        h = F.conv2d(h, *conv2, padding=1)
        return h + (x if shortcut is None else F.conv2d(x, *shortcut))
    h = _last(F.conv2d(h, conv2[0], padding=1))
    _add_op(h, x if shortcut is None else _last(F.conv2d(x, *shortcut)), conv2[1])
    return h


def _last(x: Tensor) -> Tensor:
    """cuDNN answers channels last to channels last; of one pixel or channel torch cannot tell."""
    return x.contiguous(memory_format=torch.channels_last)
