"""Reference of `ops.patch_embed`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def patch_embed(images: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `vfmtok_fast.ops.patch_embed`."""
    x = ((images.clamp(-1, 1) + 1) / 2 - mean[:, None, None]) / std[:, None, None]
    x = F.conv2d(x.to(weight.dtype), weight, bias, stride=weight.shape[-1])
    return x.flatten(2).transpose(1, 2)
