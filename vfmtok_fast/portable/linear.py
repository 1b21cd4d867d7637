"""Linear layers of a decoding step on a CPU, which cost one read of the weight.

Measured on two cores (AMD EPYC, torch 2.14.1, float32, weights not in cache; GB/s of weights), on
one day, and on another when the machine read memory at half that rate:

    rows   N x K         F.linear   mm(weight, x.T)   oneDNN
    1      2304 x 768    19         19                39
    4      2304 x 768    13 / 7.0   43 / 17           31 / 11
    4      768 x 2048    13 / 7.1   17 / 14           29 / 12
    8      2304 x 768         6.7        8.3               11
    16     2304 x 768    11 / 6.8   13 / 9.2          24 / 8.1
    128    2304 x 768    3.1        3.1               6.9

`F.linear` is MKL's for float32, and slow at all sizes on that processor. oneDNN is what it takes
for half precision. All read the weight as it lies in memory; nothing is packed or copied: oneDNN's
packed weights gave 17 where it gave 11 and `mm` 17, for a second copy of them. For K = 2048 the two
days disagree: by these rates `mm` loses 2 ms a step of GPT-B on the first, and gains 2 on the other
(measured), which needs it more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of an int8 weight that are widened at once.
_BLOCK = 256
# What torch.compile makes of a linear layer; there is no public name for it. Asked once, for a
# trace cannot ask.
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def unsupported_reason(x: Tensor, *rest: object, **options: object) -> str | None:
    """Why the ops made of `linear` cannot take a call, or None."""
    if torch.is_autocast_enabled(x.device.type):
        return "it computes in the dtype of its input, which autocast would change"
    return None


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """`product`, contiguous."""
    return product(x, weight, scale).contiguous()


def product(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """``x @ weight.T`` for x [B, K] and weight [N, K]: [B, N] of any strides; no gradients.

    With ``scale`` [N] the weight is int8, and stands for ``scale[:, None] * weight``.
    """
    rows, K = x.shape
    if scale is not None:
        return _int8_linear(x, weight, scale)
    if x.dtype != torch.float32 or x.device.type != "cpu" or rows == 0 or K == 0:
        return F.linear(x, weight)
    if 2 <= rows <= 5 and K <= 2048:
        # Contiguous, or the product takes another, slow way.
        return torch.mm(weight, x.contiguous().T).T
    if _ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


def _int8_linear(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    (rows, K), N = x.shape, weight.shape[0]
    kernel = x.dtype == torch.bfloat16 and x.device.type == "cpu" and weight.is_contiguous()
    if kernel and hasattr(torch, "_weight_int8pack_mm") and rows and N and K and K % 32 == 0:
        # What torchao's weight-only layers take; there is no public name for it. It reads past the
        # end of rows of other lengths (seen: a crash), and its scales are bfloat16, so ours follow.
        ones = torch.ones(N, dtype=x.dtype)
        return torch._weight_int8pack_mm(x.contiguous(), weight, ones).mul_(scale)
    # In blocks that stay in the cache: all of it at once would be written to memory, and read back.
    # The scale comes first, or float16 might overflow.
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    blocks = [
        F.linear(x, (part.to(exact) * by.to(exact)[:, None]).to(x.dtype))
        for part, by in zip(weight.split(_BLOCK), scale.split(_BLOCK), strict=True)
    ]
    return torch.cat(blocks, dim=1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`, in fewer operations."""
    if x.dtype == torch.float64:
        return F.rms_norm(x, weight.shape, weight, eps)
    # Torch's own is no kernel on a CPU but eight operations, some of them for gradients.
    wide = x.float()
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse.div_(x.shape[-1]).add_(eps).rsqrt_()
    normal = wide * inverse
    return normal.to(x.dtype).mul_(weight)
