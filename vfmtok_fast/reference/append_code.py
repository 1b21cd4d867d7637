"""Reference of `ops.append_code`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def append_code(
    code: Tensor, codes: Tensor, position: int | Tensor, embedding: Tensor, x: Tensor
) -> None:
    """See `vfmtok_fast.ops.append_code`."""
    x.copy_(F.embedding(code, embedding).repeat(x.shape[0] // max(code.shape[0], 1), 1))
    if isinstance(position, Tensor):
        codes.index_copy_(1, position[:1], code[:, None])
        position.add_(1)
    else:
        # Not codes[:, position], of which torch.compile makes a variant for every position.
        codes.select(1, position).copy_(code)
