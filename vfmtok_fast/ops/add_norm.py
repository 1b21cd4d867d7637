"""Residual addition and the LayerNorm of its result, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import add_norm as reference
from ..switch import Op
from .checks import FLOATING, check_eps, check_on, check_tensor

_op = Op("add_norm", reference.add_norm)


def add_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, and normalise the sum.

    ``sum = x + scale * branch`` and ``normed = LayerNorm(sum) * weight + bias``, with float32
    statistics of the rounded sum. The stream may have a wider dtype than the branch and ``normed``:
    float32 around half-precision products. Differentiable; the fast implementations support first
    derivatives only.

    Args:
        x: [..., C], the stream, C >= 1.
        branch: the shape of ``x``, in a dtype that ``x`` can hold.
        weight, bias: [C], of the norm, with the same dtype.
        scale: [C] (LayerScale), or None for 1.
        eps: added to the variance.
        dtype: of ``normed``; None means that of ``x``.

    Returns:
        ``sum`` in the dtype of ``x``, and ``normed``; both with the shape of ``x``.

    Raises:
        TypeError: not floating tensors, a branch wider than the stream, or no floating dtype.
        ValueError: shapes that do not fit, two devices, or a negative eps.

    Source: layer normalisation, arXiv 1607.06450; LayerScale, arXiv 2103.17239.
    """
    name = "add_norm"
    check_tensor(name, "x", x, "[..., C]", getattr(x, "ndim", 1) or 1)
    check_tensor(name, "branch", branch, "[..., C]", tuple(x.shape))
    vectors = {"weight": weight, "bias": bias} | ({} if scale is None else {"scale": scale})
    for part, value in vectors.items():
        check_tensor(name, part, value, "[C]", (x.shape[-1],))
    for part, value in {"branch": branch, **vectors}.items():
        check_on(name, part, value, "x", x)
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: x must have at least one channel, got shape {tuple(x.shape)}")
    if torch.promote_types(x.dtype, branch.dtype) != x.dtype:
        raise TypeError(f"{name}: branch must fit into x's {x.dtype}, got {branch.dtype}")
    if weight.dtype != bias.dtype:
        raise TypeError(f"{name}: bias must be {weight.dtype}, as weight is, got {bias.dtype}")
    dtype = x.dtype if dtype is None else dtype
    if dtype not in FLOATING:
        raise TypeError(f"{name}: dtype must be floating point, got {dtype}")
    check_eps(name, eps)
    return _op(x, branch, weight, bias, scale, eps, dtype)
