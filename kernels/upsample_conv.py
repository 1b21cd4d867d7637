"""`ops.upsample_conv` on a GPU: one transposed convolution of cuDNN's.

What it computes: nearest x2, then a 3x3 convolution, as the transposed convolution with the two
kernels convolved, 4x4 and stride 2 (`functional.upsampling_kernel`); exact but for the roundings of
the summed weights. Without gradients, the bias is added in place by `residual_block`'s kernel.

Cost: 16 products for a pixel of the small map where there were 36, and no large map between: of 64
pictures in bfloat16 on an H200, 10 ms of upsampling and 1 of 30 ms of convolutions went (measured:
cuDNN's transposed convolution takes longer for its operations than its forward one).
`bench_pixel_decoder` times it beside four 2x2 convolutions that are woven together, which need two
more passes over the result.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional import upsampling_kernel
from .group_norm_silu import unsupported_map
from .residual_block import add_in_place


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `vfmtok_fast.ops.upsample_conv`."""
    kernel, how = upsampling_kernel(weight), {"stride": 2, "padding": 1}
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    if learns or not x.numel():
        return F.conv_transpose2d(x, kernel, bias, **how)
    out = F.conv_transpose2d(x, kernel, **how).contiguous(memory_format=torch.channels_last)
    if unsupported_map(out) is not None:
        return out.add_(bias[:, None, None])
    # torch adds it at a third of the memory's rate.
    add_in_place(out, bias, None, None)
    return out
