"""`ops.upsample_conv` on a GPU: one transposed convolution of cuDNN's.

What it computes: nearest x2, then a 3x3 convolution, as the transposed convolution with the two
kernels convolved, 4x4 and stride 2 (`functional.upsampling_kernel`); exact but for the roundings of
the summed weights. No kernel of ours.

Cost: 16 products for a pixel of the small map where there were 36, and no large map between: of 64
pictures in bfloat16 on an H200, 10 ms of upsampling and, of 30 ms of convolutions, about 4 are
predicted to go. Not measured: how near cuDNN's transposed convolution comes to its forward one.
`bench_pixel_decoder` times it beside four 2x2 convolutions that are woven together, which need two
more passes over the result.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..functional import upsampling_kernel


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `vfmtok_fast.ops.upsample_conv`."""
    return F.conv_transpose2d(x, upsampling_kernel(weight), bias, stride=2, padding=1)
