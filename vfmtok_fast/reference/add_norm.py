"""Reference of `ops.add_norm`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor,
    scale: Tensor | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `vfmtok_fast.ops.add_norm`."""
    branch = branch.to(x.dtype)
    total = x + (branch if scale is None else branch * scale.to(x.dtype))
    if dtype == weight.dtype == x.dtype:
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(total.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return total, normed.to(dtype)
