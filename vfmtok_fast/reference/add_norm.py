"""Reference of `ops.add_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import layer_norm


def add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor,
    scale: Tensor | None, eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `vfmtok_fast.ops.add_norm`."""
    branch = branch.to(x.dtype)
    total = x + (branch if scale is None else branch * scale.to(x.dtype))
    return total, layer_norm(total, weight, bias, eps, dtype)
