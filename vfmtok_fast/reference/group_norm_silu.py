"""Reference of `ops.group_norm_silu`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    """See `vfmtok_fast.ops.group_norm_silu`."""
    # In place: on a CPU, allocating a tensor of this size costs more than computing its values.
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps), inplace=True)
