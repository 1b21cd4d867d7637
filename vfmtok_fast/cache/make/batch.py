"""Batches on their way to a device: 8-bit squares are transferred, and views are cut there.

The ten crops of an image are cuts of one 369 x 369 square. Transferring the square takes a tenth of
the bytes that separate views would take, and no CPU core spends time on cropping, mirroring or
converting.
"""

from __future__ import annotations

import numpy as np
import torch

from ...images import to_float
from ..format.views import Cut, Plan


class Batch:
    """The squares of the images in one batch, and which cut of which square each row is.

    Rows without an image, which are bad images and padding, are black.

    Args:
        plan: plan of the views.
        size: number of rows.
        pinned: whether to keep the squares in pinned memory, from which a GPU copies directly.
    """

    def __init__(self, plan: Plan, size: int, pinned: bool) -> None:
        self.plan, self.size = plan, size
        # Only part of the first and of the last image may be in this batch.
        pictures = (size - 2) // len(plan.cuts) + 2
        self.squares = {
            side: torch.empty(
                (min(size, pictures * plan.sides.count(side)), side, side, 3),
                dtype=torch.uint8,
                device="cpu",
                pin_memory=pinned,
            )
            for side in set(plan.sides)
        }
        # The same memory as arrays: converting a tensor per image would cost more than the copy.
        self.arrays = {side: squares.numpy() for side, squares in self.squares.items()}
        self.clear()

    def __len__(self) -> int:
        return self.size

    def clear(self) -> None:
        """Drop all rows."""
        self.filled = dict.fromkeys(self.squares, 0)
        # By cut and side: the rows, and the square that each row is cut from.
        self.cuts: dict[tuple[Cut, int], tuple[list[int], list[int]]] = {}
        self.last: tuple[list[np.ndarray] | None, dict[int, int]] = (None, {})

    def add(self, row: int, bases: list[np.ndarray], view: int) -> None:
        """Make a row a view of an image.

        Args:
            row: position in the batch.
            bases: from `make_bases`; rows that get the same list object share its squares.
            view: position in the plan.
        """
        if self.last[0] is not bases:
            self.last = (bases, {})
        places, cut = self.last[1], self.plan.cuts[view]
        side = self.plan.sides[cut.base]
        if cut.base not in places:
            places[cut.base] = self.filled[side]
            self.arrays[side][self.filled[side]] = bases[cut.base]
            self.filled[side] += 1
        rows, squares = self.cuts.setdefault((cut, side), ([], []))
        rows.append(row)
        squares.append(places[cut.base])

    def to(self, device: torch.device) -> torch.Tensor:
        """Cut the views on a device: float32 [size, 3, side, side] in [-1, 1], exact everywhere."""
        sent = {
            side: squares[: self.filled[side]].to(device, non_blocking=True)
            for side, squares in self.squares.items()
        }
        size = self.plan.size
        views = torch.zeros((self.size, size, size, 3), dtype=torch.uint8, device=device)
        for (cut, side), (rows, squares) in self.cuts.items():
            part = sent[side][:, cut.top : cut.top + size, cut.left : cut.left + size]
            part = part[as_index(squares)]
            views[as_index(rows)] = part.flip(2) if cut.flip else part
        return to_float(views)


def as_index(places: list[int]) -> slice | list[int]:
    """Turn positions into an index; if they are consecutive, a slice, which copies nothing."""
    first, count = places[0], len(places)
    return slice(first, first + count) if places == list(range(first, first + count)) else places
