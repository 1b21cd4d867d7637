"""Portable `ops.append_code`: rows are picked without a padding index, and copied once."""

from __future__ import annotations

from torch import Tensor


def append_code(
    code: Tensor, codes: Tensor, position: int | Tensor, embedding: Tensor, x: Tensor
) -> None:
    """See `vfmtok_fast.ops.append_code`."""
    copies = x.shape[0] // max(len(code), 1)
    x.view(copies, len(code), x.shape[1]).copy_(embedding.index_select(0, code))
    if isinstance(position, Tensor):
        codes.index_copy_(1, position[:1], code[:, None])
        position.add_(1)
    else:
        codes.select(1, position).copy_(code)
