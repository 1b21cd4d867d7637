"""Portable `ops.linear_residual`: the product as `linear` has it."""

from __future__ import annotations

from torch import Tensor

from .linear import linear
from .linear import unsupported_reason as unsupported_reason


def linear_residual(
    x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    """See `vfmtok_fast.ops.linear_residual`."""
    return linear(x, weight, scale).add_(residual)
