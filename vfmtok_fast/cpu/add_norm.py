"""`ops.add_norm` on a CPU: scale and add in one pass, then torch's LayerNorm.

Measured on 2 cores of an AMD EPYC, torch 2.14, both forms in turn, best of 40, at 2,324 rows of
1,024 with a scale: float32 2.19 ms instead of 2.77, bfloat16 1.20 instead of 1.43. Without a scale
the two are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import layer_norm


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor,
    scale: Tensor | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `vfmtok_fast.ops.add_norm`."""
    if scale is None:
        total = x + branch
    else:
        total = torch.addcmul(x, branch.to(x.dtype), scale.to(x.dtype))
    return total, layer_norm(total, weight, bias, eps, dtype)
