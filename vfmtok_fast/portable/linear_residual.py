"""Portable `ops.linear_residual`: the product as `linear.product` has it."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import product
from .linear import unsupported_reason as unsupported_reason


def linear_residual(
    x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    """See `vfmtok_fast.ops.linear_residual`."""
    # In this order: the sum is laid out as its first term.
    return torch.add(residual.contiguous(), product(x, weight, scale))
