"""Portable `ops.linear_residual`: the product as `few_rows` has it."""

from __future__ import annotations

from torch import Tensor

from .few_rows import linear


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """See `vfmtok_fast.ops.linear_residual`."""
    return residual + linear(x, weight)
