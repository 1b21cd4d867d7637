"""Reference of `ops.linear_residual`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_residual(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    """See `vfmtok_fast.ops.linear_residual`."""
    return residual + F.linear(x, weight)
