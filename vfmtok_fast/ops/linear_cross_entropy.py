"""An output layer and its cross-entropy in one op, so that not all logits need be in memory."""

from __future__ import annotations

from torch import Tensor

from ..reference import linear_cross_entropy as reference
from ..switch import Op
from .checks import (
    as_autocast,
    check_int,
    check_integers,
    check_number,
    check_on,
    check_range,
    check_shape,
    check_tensor,
)

_op = Op("linear_cross_entropy", reference.linear_cross_entropy)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return the cross-entropy of the logits ``x @ weight.T + bias`` against ``targets``.

    It computes torch's ``cross_entropy`` of these logits in float32. Under autocast x, weight and
    bias are cast to its dtype, as in torch's own linear layer. Differentiable in all three; the
    fast implementations support first derivatives only.

    Args:
        x: [N, C].
        weight: [V, C], V >= 1.
        targets: [N] integers in [0, V), or ``ignore_index`` for rows that do not count. On a GPU
            the values are not checked, which would wait for the GPU. For a target out of range, the
            reference fails with torch's device-side assertion, and the kernel returns NaN for the
            row's loss and gradients.
        bias: [V] or None.
        ignore_index: any integer of 64 bits.
        label_smoothing: the share in [0, 1] of each target that is spread evenly over all V codes.
        reduction: "mean" over the rows that count (NaN if none does), "sum", or "none".
        x, weight and bias are floating, with one device and, except under autocast, one dtype.

    Returns:
        A scalar, or [N] for "none", with 0 for rows that do not count; float32, or float64 if x is
        float64.

    Raises:
        TypeError: not floating tensors, two dtypes, or targets that are not integers.
        ValueError: shapes that do not fit, two devices, or a number out of range.

    Source: label smoothing, arXiv 1512.00567, section 7.
    """
    name = "linear_cross_entropy"
    check_tensor(name, "x", x, "[N, C]", 2)
    check_tensor(name, "weight", weight, "[V, C]", 2)
    check_shape(name, "x", x, (x.shape[0], weight.shape[1]))
    V = weight.shape[0]
    if V == 0:
        raise ValueError(f"{name}: weight must have at least one row, got {tuple(weight.shape)}")
    if bias is not None:
        check_tensor(name, "bias", bias, "[V]", (V,))
    check_integers(name, "targets", targets, (x.shape[0],))
    check_on(name, "targets", targets, "x", x)
    check_int(name, "ignore_index", ignore_index, 2**63, -(2**63))
    check_number(name, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{name}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    targets = targets.long()
    if x.device.type == "cpu":
        check_range(name, "targets", targets.masked_fill(targets == ignore_index, 0), 0, V)
    x, weight, bias = as_autocast(name, x, weight, bias)
    return _op(x, weight, targets, bias, ignore_index, float(label_smoothing), reduction)
