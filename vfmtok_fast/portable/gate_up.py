"""Portable `ops.gate_up`: the products as `linear.product` has them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import product, rms_norm
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
    gate = F.silu(product(x, gate_weight, gate_scale), inplace=True)
    up = product(x, up_weight, up_scale)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return (gate * up).contiguous()
    # Both may lie the other way round; the product of the two sets that right.
    return torch.mul(gate, up, out=torch.empty(gate.shape, dtype=gate.dtype, device=gate.device))
