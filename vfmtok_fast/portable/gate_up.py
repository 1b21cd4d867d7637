"""Portable `ops.gate_up`: the products as `linear` has them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .linear import linear, rms_norm
from .linear import unsupported_reason as unsupported_reason


def gate_up(
    x: Tensor, norm_weight: Tensor, gate_weight: Tensor, up_weight: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """See `vfmtok_fast.ops.gate_up`."""
    x = rms_norm(x, norm_weight, eps)
    return F.silu(linear(x, gate_weight), inplace=True).mul_(linear(x, up_weight))
