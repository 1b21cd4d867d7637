"""Reference of `ops.nearest_code`: score every code and take the largest, `k` times."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_code(
    z: Tensor, codebook: Tensor, *, k: int = 1, normalize: bool = True, return_score: bool = False
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """See `vfmtok_fast.ops.nearest_code`."""
    # Half-precision input is taken as exact; rounding the scores to its dtype would create ties.
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    if normalize:
        z, codebook = _unit(z.to(dtype)), _unit(codebook.to(dtype))
        # argmin |z - e|^2 = argmax z.e when both have length one.
        scores = z @ codebook.T
    else:
        # |z|^2 is the same for every code, so it can be left out. Far from the origin the rest is a
        # small difference of large numbers, which float32 cannot represent.
        z, codebook = z.double(), codebook.double()
        scores = z @ codebook.T - codebook.square().sum(-1) / 2
        # Infinity minus infinity need not be NaN. A code that is not finite must win, as NaN does,
        # and a query that is not finite has no distances.
        scores.masked_fill_(~codebook.isfinite().all(-1), torch.nan)
        scores.masked_fill_(~z.isfinite().all(-1, keepdim=True), torch.nan)
    score, code = _largest(scores, k)
    score = score.to(dtype)
    if k == 1:
        score, code = score[:, 0], code[:, 0]
    return (code, score) if return_score else code


def _unit(rows: Tensor) -> Tensor:
    """Scale rows to unit length; the squares of very long rows would overflow."""
    long = rows.abs().amax(-1, keepdim=True) > 2.0**60
    return F.normalize(torch.where(long, rows * 2.0**-80, rows), dim=-1)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order, [N, k]; `topk` does not order ties."""
    found = []
    for _ in range(k):
        # `max` takes the first of equal scores, and NaN before all numbers.
        found.append(scores.max(dim=-1, keepdim=True))
        if len(found) < k:
            scores = scores.scatter(1, found[-1].indices, -torch.inf)
    score, code = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    # If the best is NaN, nothing is ordered: its code comes first, then the lowest others.
    undefined = score[:, :1].isnan()
    others = torch.arange(k - 1, device=code.device)
    others = torch.cat([code[:, :1], others + (others >= code[:, :1])], dim=1)
    return torch.where(undefined, torch.nan, score), torch.where(undefined, others, code)
