"""Portable `ops.gate_up`: the products as `linear` has them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .linear import linear, rms_norm
from .linear import unsupported_reason as unsupported_reason


def gate_up(
    x: Tensor,
    norm_weight: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    *,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See `vfmtok_fast.ops.gate_up`."""
    x = rms_norm(x, norm_weight, eps)
    gate = F.silu(linear(x, gate_weight, gate_scale), inplace=True)
    return gate.mul_(linear(x, up_weight, up_scale))
