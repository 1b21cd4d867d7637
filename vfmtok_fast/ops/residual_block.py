"""The residual block of VQGAN's decoder."""

from __future__ import annotations

from torch import Tensor

from ..reference import residual_block as reference
from ..reference.residual_block import Pair
from ..switch import Op
from .checks import check_eps, check_groups, check_same, check_shape, check_tensor

_op = Op("residual_block", reference.residual_block, reference_for="cpu")


def residual_block(
    x: Tensor, norm1: Pair, conv1: Pair, norm2: Pair, conv2: Pair, shortcut: Pair | None = None, *,
    num_groups: int = 32, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """Return ``x + conv2(silu(norm2(conv1(silu(norm1(x))))))``: 3x3 convolutions, group norms.

    Differentiable; the fast implementation supports first derivatives only.

    Args:
        x: [B, C, H, W].
        norm1, conv1, norm2, conv2: (weight, bias) of each: [C], [O, C, 3, 3], [O], [O, O, 3, 3].
        shortcut: (weight [O, C, 1, 1], bias) of a convolution that replaces ``x`` in the sum; None
            adds ``x`` itself, and O must be C.
        num_groups: number of groups of channels that are normalised together; divides C and O.
        eps: added to the variances.
        All tensors are floating, with one dtype and device.

    Returns:
        [B, O, H, W], dtype of ``x``.

    Raises:
        TypeError: not floating tensors, or two dtypes.
        ValueError: shapes that do not fit, two devices, or an eps below 0.

    Source: VQGAN (arXiv 2012.09841), as in the release's pixel decoder.
    """
    name = "residual_block"
    check_tensor(name, "x", x, "[B, C, H, W]", 4)
    check_tensor(name, "conv1's weight", conv1[0], "[O, C, 3, 3]", 4)
    C, out = x.shape[1], conv1[0].shape[0]
    shapes = {
        "norm1": (norm1, (C,)),
        "conv1": (conv1, (out, C, 3, 3)),
        "norm2": (norm2, (out,)),
        "conv2": (conv2, (out, out, 3, 3)),
    }
    if shortcut is not None:
        shapes["shortcut"] = (shortcut, (out, C, 1, 1))
    elif out != C:
        raise ValueError(f"{name}: needs a shortcut from {C} to {out} channels, got None")
    tensors = {"x": x}
    for part, ((weight, bias), shape) in shapes.items():
        check_shape(name, f"{part}'s weight", weight, shape)
        check_shape(name, f"{part}'s bias", bias, shape[:1])
        tensors |= {f"{part}'s weight": weight, f"{part}'s bias": bias}
    check_same(name, autocast=True, **tensors)
    for channels in (C, out):
        check_groups(name, num_groups, channels)
    check_eps(name, eps)
    return _op(x, norm1, conv1, norm2, conv2, shortcut, num_groups, eps)
