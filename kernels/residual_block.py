"""Triton `ops.residual_block`: cuDNN's convolutions between the kernels of `group_norm_silu`.

What it computes: x + conv2(silu(norm2(conv1(silu(norm1(x)))))), with x and all intermediate maps
channels last. PyTorch adds a convolution's bias in a separate pass. Here the bias of the first
convolution is added in the following norm, where it costs nothing. The biases of the second
convolution and of the shortcut are added together with x, which takes a pass anyway.

Passes over a map of O channels besides the convolutions: 3 and 3 for the norms, 3 for the sum. ATen
needs 3 + 2 for each norm and SiLU, 2 for each bias and 3 for the sum. group_norm_silu.md has the
cost of a decode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .group_norm_silu import _at, _shift, _wide, maps_grid, norm_silu, unsupported_map
from .launch import on
from .registered import registered

Pair = tuple[Tensor, Tensor]


@triton.jit
def _add(
    h, bias, x, shift, PIXELS, C, ROWS: tl.constexpr, C_P: tl.constexpr, TILES: tl.constexpr,
    ADDED: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """h += bias; if ADDED, also x, or x + shift if SHIFTED; all channels last."""
    begin = tl.program_id(0).to(tl.int64) * (ROWS * TILES)
    h, x = h + begin * C, x + begin * C
    last = tl.minimum(PIXELS - begin, ROWS * TILES).to(tl.int32)
    o_c = tl.arange(0, C_P)
    b, by = _shift(bias, o_c, C, True), _shift(shift, o_c, C, SHIFTED)
    for turn in range(0, last, ROWS):
        at, m = _at(turn + tl.arange(0, ROWS), last, o_c, C)
        # Rounded before the addition, as the result of a convolution is.
        v = _wide(tl.load(h + at, mask=m, other=0.0), b, True)
        if ADDED:
            v += _wide(tl.load(x + at, mask=m, other=0.0), by, SHIFTED)
        tl.store(h + at, v, mask=m)


def _add_in_place(h: Tensor, bias: Tensor, x: Tensor | None, shift: Tensor | None) -> None:
    if not h.numel():
        return
    C = h.shape[1]
    pixels = h.numel() // C
    constants, programs = maps_grid(h, pixels)
    bias = bias.contiguous()
    by = bias if shift is None else shift.contiguous()
    with on(h.device):
        _add[(programs,)](
            h, bias, h if x is None else x, by, pixels, C, ADDED=x is not None,
            SHIFTED=shift is not None, **constants,
        )  # fmt: skip


# h += bias + x + shift, with bias and shift per channel; h and x are channels last.
add_in_place = registered(
    "bias_add_triton(Tensor(a!) h, Tensor bias, Tensor? x, Tensor? shift) -> ()"
)(_add_in_place)


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
    """See `vfmtok_fast.ops.residual_block`; takes calls that `unsupported_reason` accepts."""
    x = _last(x)
    h = _last(F.conv2d(norm_silu(x, None, *norm1, num_groups, eps), conv1[0], padding=1))
    h = norm_silu(h, conv1[1], *norm2, num_groups, eps)
    wanted = (x, h, *conv2, *(shortcut or ()))
    if torch.is_grad_enabled() and any(part.requires_grad for part in wanted):
        h = F.conv2d(h, *conv2, padding=1)
        # Under autocast x may have a wider dtype.
        return h + (x if shortcut is None else F.conv2d(x, *shortcut)).to(h.dtype)
    h = _last(F.conv2d(h, conv2[0], padding=1))
    if shortcut is None:
        add_in_place(h, conv2[1], x, None)
    else:
        add_in_place(h, conv2[1], _last(F.conv2d(x, shortcut[0])), shortcut[1])
    return h


def _last(x: Tensor) -> Tensor:
    """Make x channels last.

    cuDNN returns channels last for channels-last inputs, but with one pixel or one channel torch
    cannot tell the layouts apart.
    """
    return x.contiguous(memory_format=torch.channels_last)
