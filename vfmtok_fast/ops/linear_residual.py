"""A linear layer of a decoding step, added to the residual stream."""

from __future__ import annotations

from torch import Tensor

from ..reference import linear_residual as reference
from ..switch import Op
from .checks import check_same, check_shape, check_tensor, check_weights

_op = Op("linear_residual", reference.linear_residual)


def linear_residual(
    x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    """``residual + x @ weight.T``, for few rows: reading the weight is what it costs.

    For inference: there is no backward pass.

    Args:
        x: [B, K].
        weight: [N, K], or int8 that stands for ``scale[:, None] * weight``.
        residual: [B, N].
        scale: [N] float32, of an int8 weight.

    Returns:
        [B, N], dtype of ``x``.

    Raises:
        TypeError: not floating tensors, or two dtypes.
        ValueError: shapes that do not fit each other, or two devices.
    """
    name = "linear_residual"
    check_tensor(name, "x", x, "[B, K]", 2)
    check_tensor(name, "residual", residual, "[B, N]", 2)
    check_same(name, x=x, residual=residual)
    check_weights(name, x, weight=(weight, scale, "[N, K]"))
    check_shape(name, "weight", weight, (weight.shape[0], x.shape[1]))
    check_shape(name, "residual", residual, (x.shape[0], weight.shape[0]))
    return _op(x, weight, residual, scale=scale)
