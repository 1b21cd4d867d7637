"""A linear layer with its activation: exact GELU, ReLU, SwiGLU's gate or none."""

from __future__ import annotations

from torch import Tensor

from ..reference import linear as reference
from ..switch import Op
from .checks import as_autocast, check_shape, check_tensor

_op = Op("linear", reference.linear)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """Return ``activation(x @ weight.T + bias)``.

    Under autocast all three tensors are cast to its dtype, as in torch's own linear layer.
    Differentiable; the fast implementations support first derivatives only.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.
        activation: None, "gelu" (exact, with the error function), "relu", or "swiglu": silu of the
            first half of the N outputs, times the second half.
        All tensors are floating, with one device and, except under autocast, one dtype.

    Returns:
        [..., N], or [..., N / 2] for "swiglu"; dtype of ``weight``, or autocast's.

    Raises:
        TypeError: not floating tensors, or two dtypes.
        ValueError: shapes that do not fit, two devices, or an activation that does not exist.

    Source: Gaussian error linear units, arXiv 1606.08415; GLU variants, arXiv 2002.05202.
    """
    name = "linear"
    check_tensor(name, "weight", weight, "[N, K]", 2)
    check_tensor(name, "x", x, "[..., K]", getattr(x, "ndim", 1) or 1)
    check_shape(name, "x", x, (*x.shape[:-1], weight.shape[1]))
    if bias is not None:
        check_tensor(name, "bias", bias, "[N]", (weight.shape[0],))
    if activation not in (None, "gelu", "relu", "swiglu"):
        raise ValueError(
            f"{name}: activation must be None, 'gelu', 'relu' or 'swiglu', got {activation!r}"
        )
    if activation == "swiglu" and weight.shape[0] % 2:
        raise ValueError(f"{name}: 'swiglu' halves the outputs, got {weight.shape[0]} of them")
    return _op(*as_autocast(name, x, weight, bias), activation)
