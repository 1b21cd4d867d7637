"""Portable `ops.norm_linear`: the product as `linear` has it."""

from __future__ import annotations

import torch
from torch import Tensor

from .linear import linear, rms_norm
from .linear import unsupported_reason as unsupported_reason


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See `vfmtok_fast.ops.norm_linear`."""
    y = linear(rms_norm(x, norm_weight, eps), weight, scale)
    return y if y.dtype == torch.float64 else y.float()
