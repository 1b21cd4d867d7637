"""Reference of `ops.norm_linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dequantized import dequantized
from .rms_norm import rms_norm


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """See `vfmtok_fast.ops.norm_linear`."""
    y = F.linear(rms_norm(x, norm_weight, eps), dequantized(weight, scale, x.dtype))
    return y if y.dtype == torch.float64 else y.float()
