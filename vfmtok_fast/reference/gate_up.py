"""Reference of `ops.gate_up`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .dequantized import dequantized
from .rms_norm import rms_norm


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
    gate = F.linear(x, dequantized(gate_weight, gate_scale, x.dtype))
    return F.silu(gate) * F.linear(x, dequantized(up_weight, up_scale, x.dtype))
