"""Reference of `ops.gate_up`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .rms_norm import rms_norm


def gate_up(
    x: Tensor, norm_weight: Tensor, gate_weight: Tensor, up_weight: Tensor, *, eps: float = 1e-5
) -> Tensor:
    """See `vfmtok_fast.ops.gate_up`."""
    x = rms_norm(x, norm_weight, eps)
    return F.silu(F.linear(x, gate_weight)) * F.linear(x, up_weight)
