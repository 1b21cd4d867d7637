"""Reference of `ops.linear`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """See `vfmtok_fast.ops.linear`."""
    y = F.linear(x, weight, bias)
    if activation is None:
        return y
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(y) if activation == "gelu" else F.relu(y)
