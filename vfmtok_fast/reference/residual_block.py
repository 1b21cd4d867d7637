"""Reference of `ops.residual_block`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .group_norm_silu import group_norm_silu

Pair = tuple[Tensor, Tensor]


def residual_block(
    x: Tensor, norm1: Pair, conv1: Pair, norm2: Pair, conv2: Pair, shortcut: Pair | None,
    num_groups: int, eps: float,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.residual_block`."""
    h = F.conv2d(group_norm_silu(x, *norm1, num_groups, eps), *conv1, padding=1)
    h = F.conv2d(group_norm_silu(h, *norm2, num_groups, eps), *conv2, padding=1)
    return h.add_(x if shortcut is None else F.conv2d(x, *shortcut))
