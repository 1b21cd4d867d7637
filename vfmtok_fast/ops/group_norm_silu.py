"""GroupNorm and SiLU in one op."""

from __future__ import annotations

from torch import Tensor

from ..reference import group_norm_silu as reference
from ..switch import Op
from .checks import check_eps, check_groups, check_same, check_tensor

_op = Op("group_norm_silu", reference.group_norm_silu, reference_for="cpu")


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6
) -> Tensor:
    """Return ``silu(GroupNorm(x))``.

    Differentiable; the fast implementation supports first derivatives only.

    Args:
        x: [B, C, H, W].
        weight, bias: [C].
        num_groups: number of groups of channels that are normalised together; divides C.
        eps: added to the variance.
        All tensors are floating, with one dtype and device.

    Returns:
        [B, C, H, W], dtype of ``x``. Statistics are at least float32. Triton returns channels last,
        and copies an input that is not.

    Raises:
        TypeError: not floating tensors, or two dtypes.
        ValueError: shapes that do not fit, two devices, or an eps below 0.

    Source: Group Normalization (arXiv 1803.08494) equation 1; SiLU as in VQGAN's decoder.
    """
    name = "group_norm_silu"
    check_tensor(name, "x", x, "[B, C, H, W]", 4)
    C = x.shape[1]
    for part, value in (("weight", weight), ("bias", bias)):
        check_tensor(name, part, value, f"[{C}]", (C,))
    check_same(name, autocast=True, x=x, weight=weight, bias=bias)
    check_groups(name, num_groups, C)
    check_eps(name, eps)
    return _op(x, weight, bias, num_groups, eps)
