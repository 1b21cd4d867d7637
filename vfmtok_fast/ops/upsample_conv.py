"""Nearest upsampling and the convolution after it, as one convolution."""

from __future__ import annotations

from torch import Tensor

from ..reference import upsample_conv as reference
from ..switch import Op
from .checks import check_same, check_shape, check_tensor

_op = Op("upsample_conv", reference.upsample_conv)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Repeat every pixel 2x2, then apply a 3x3 convolution with padding 1; differentiable.

    Args:
        x: [B, C, H, W].
        weight: [O, C, 3, 3].
        bias: [O].
        All tensors are floating, with one dtype and device.

    Returns:
        [B, O, 2 H, 2 W].

    Raises:
        TypeError: not floating tensors, or two dtypes.
        ValueError: shapes that do not fit, or two devices.

    Source: VQGAN (arXiv 2012.09841), as in the release's pixel decoder.
    """
    name = "upsample_conv"
    check_tensor(name, "x", x, "[B, C, H, W]", 4)
    check_tensor(name, "weight", weight, "[O, C, 3, 3]", 4)
    check_shape(name, "weight", weight, (weight.shape[0], x.shape[1], 3, 3))
    check_tensor(name, "bias", bias, "[O]", (weight.shape[0],))
    check_same(name, autocast=True, x=x, weight=weight, bias=bias)
    return _op(x, weight, bias)
