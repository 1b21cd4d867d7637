"""Random feature maps and the weights of a residual block."""

from __future__ import annotations

import torch
from torch import Tensor


def maps(*shape: int, seed: int = 0, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def block(C: int, O: int, dtype=torch.float64, shortcut: bool = True):  # noqa: E741
    """Return the five (weight, bias) pairs of a block."""
    shapes = (((C,), (C,)), ((O, C, 3, 3), (O,)), ((O,), (O,)), ((O, O, 3, 3), (O,)))
    pairs = [
        tuple(maps(*shape, seed=10 * i + j, dtype=dtype) / 3 for j, shape in enumerate(pair))
        for i, pair in enumerate(shapes)
    ]
    last = (maps(O, C, 1, 1, seed=50, dtype=dtype), maps(O, seed=51, dtype=dtype))
    return [*pairs, last if shortcut else None]
