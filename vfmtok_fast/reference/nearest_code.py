"""Reference of `ops.nearest_code`: score every code and take the largest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_code(
    z: Tensor, codebook: Tensor, *, normalize: bool = True, return_score: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """See `vfmtok_fast.ops.nearest_code`."""
    # Half-precision input is taken as exact; rounding the scores to it would invent ties.
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    z, codebook = z.to(dtype), codebook.to(dtype)
    if normalize:
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
        # argmin |z - e|^2 = argmax z.e when both have length one.
        scores = z @ codebook.T
    else:
        # |z|^2 is the same for every code, so it can be left out.
        scores = z @ codebook.T - codebook.square().sum(-1) / 2
    score, code = scores.max(dim=-1)
    return (code, score) if return_score else code
