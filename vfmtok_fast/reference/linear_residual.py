"""Reference of `ops.linear_residual`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dequantized import dequantized


def linear_residual(
    x: Tensor, weight: Tensor, residual: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    """See `vfmtok_fast.ops.linear_residual`."""
    return residual + F.linear(x, dequantized(weight, scale, x.dtype))
