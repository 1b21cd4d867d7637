"""The first half of a decoding step's feed-forward layer."""

from __future__ import annotations

from torch import Tensor

from ..reference import gate_up as reference
from ..switch import Op
from .checks import check_eps, check_same, check_shape, check_tensor, check_weights

_op = Op("gate_up", reference.gate_up)


def gate_up(
    x: Tensor,
    norm_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    *,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``silu(n @ gate_weight.T) * (n @ up_weight.T)`` with n = RMSNorm(x): SwiGLU's hidden state.

    For inference: there is no backward pass.

    Args:
        x: [B, C].
        norm_weight: [C].
        gate_weight, up_weight: [F, C], or int8 that stands for ``scale[:, None] * weight``.
        gate_scale, up_scale: [F] float32, of an int8 weight.
        eps: of the norm, at least 0.

    Returns:
        [B, F], dtype of ``x``.

    Raises:
        TypeError: not floating tensors, or two dtypes.
        ValueError: shapes that do not fit each other, or two devices.

    Source: SwiGLU, Shazeer, "GLU variants improve transformer" (arXiv 2002.05202).
    """
    name = "gate_up"
    check_tensor(name, "x", x, "[B, C]", 2)
    check_tensor(name, "norm_weight", norm_weight, "[C]", 1)
    check_same(name, x=x, norm_weight=norm_weight)
    check_weights(
        name,
        x,
        gate_weight=(gate_weight, gate_scale, "[F, C]"),
        up_weight=(up_weight, up_scale, "[F, C]"),
    )
    shape = (gate_weight.shape[0], x.shape[1])
    check_shape(name, "norm_weight", norm_weight, shape[1:])
    check_shape(name, "gate_weight", gate_weight, shape)
    check_shape(name, "up_weight", up_weight, shape)
    check_eps(name, eps)
    return _op(
        x, norm_weight, gate_weight, up_weight, gate_scale=gate_scale, up_scale=up_scale, eps=eps
    )
