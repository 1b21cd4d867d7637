"""Reference of `ops.linear_cross_entropy`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
    ignore_index: int, label_smoothing: float, reduction: str,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.linear_cross_entropy`."""
    logits = F.linear(x, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing,
        reduction=reduction,
    )  # fmt: skip
