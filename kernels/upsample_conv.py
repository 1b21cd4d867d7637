"""`ops.upsample_conv` on a GPU: one cuDNN transposed convolution.

What it computes: nearest x2 upsampling, then a 3x3 convolution, as one transposed convolution with
stride 2 whose 4x4 kernel is the convolution of the two kernels (`functional.upsampling_kernel`);
exact except for the rounding of the summed weights. Without gradients, the bias is added in place
by `residual_block`'s kernel.

Cost: 16 products per pixel of the small map instead of 36, and no large map in between. For 64
images in bfloat16 on an H200, this saved 10 ms of upsampling and 1 of 30 ms of convolutions
(measured: cuDNN's transposed convolution takes longer for its operations than its forward one).
`bench_pixel_decoder` times it next to four interleaved 2x2 convolutions, which need two more passes
over the result.
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
    # torch would add the bias at a third of the memory bandwidth.
    add_in_place(out, bias, None, None)
    return out
