"""Resizing learned position tables."""

from __future__ import annotations

import math

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def resize_positions(table: Tensor, grid: int, *, antialias: bool = False) -> Tensor:
    """Resize a square position table by bicubic interpolation, align_corners off.

    Args:
        table: [1, side * side, C].
        grid: the new side.
        antialias: False scales by (grid + 0.1) / side, which moves the coordinates a little, as
            DINOv2's class and the release's token decoder do. True resizes to ``grid`` with
            antialiasing, as DINOv2's published models with registers do.

    Returns:
        [1, grid * grid, C].
    """
    side = math.isqrt(table.shape[1])
    if side == grid:
        return table
    image = rearrange(table, "1 (y x) c -> 1 c y x", y=side)
    if antialias:
        image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    else:
        image = F.interpolate(image, scale_factor=(grid + 0.1) / side, mode="bicubic")
    assert image.shape[-1] == grid
    return rearrange(image, "1 c y x -> 1 (y x) c")
