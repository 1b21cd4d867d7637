"""The last step of decoding one position: hidden state to logits."""

from __future__ import annotations

from torch import Tensor

from ..reference import norm_linear as reference
from ..switch import Op
from .checks import check_eps, check_same, check_shape, check_tensor, check_weights

_op = Op("norm_linear", reference.norm_linear)


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``RMSNorm(x) @ weight.T`` for few rows. For inference: there is no backward pass.

    Args:
        x: [B, C].
        norm_weight: [C].
        weight: [V, C], or int8 that stands for ``scale[:, None] * weight``.
        scale: [V] float32, of an int8 weight.
        eps: of the norm, at least 0.

    Returns:
        [B, V], float32; float64 for float64 input.

    Raises:
        TypeError: not floating tensors, or two dtypes.
        ValueError: shapes that do not fit each other, or two devices.
    """
    name = "norm_linear"
    check_tensor(name, "x", x, "[B, C]", 2)
    check_tensor(name, "norm_weight", norm_weight, "[C]", 1)
    check_same(name, x=x, norm_weight=norm_weight)
    check_weights(name, x, weight=(weight, scale, "[V, C]"))
    check_shape(name, "norm_weight", norm_weight, (x.shape[1],))
    check_shape(name, "weight", weight, (weight.shape[0], x.shape[1]))
    check_eps(name, eps)
    return _op(x, norm_weight, weight, scale=scale, eps=eps)
