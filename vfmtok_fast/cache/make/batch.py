"""Batches on their way to a device: 8-bit squares cross over, views are cut out of them there.

Ten crops of a picture are cuts of one 369 x 369 square, so a tenth of the bytes cross over that
views of their own would take, and no core spends time on cropping, mirroring or converting.
"""

from __future__ import annotations

import numpy as np
import torch

from ...images import to_float
from ..format.views import Cut, Plan


class Batch:
    """The squares of the pictures in one batch, and which cut of which square each row is.

    Rows without a picture, bad ones and padding, are black.

    Args:
        plan: of the views.
        size: rows.
        pinned: keep the squares in memory that a GPU can copy from by itself.
    """

    def __init__(self, plan: Plan, size: int, pinned: bool) -> None:
        self.plan, self.size = plan, size
        # The first and last picture may be here in part only.
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
        # The same memory: asking a tensor for it at each picture would cost more than the copy.
        self.arrays = {side: squares.numpy() for side, squares in self.squares.items()}
        self.clear()

    def __len__(self) -> int:
        return self.size

    def clear(self) -> None:
        """Forget all rows."""
        self.filled = dict.fromkeys(self.squares, 0)
        # By cut and side: the rows, and the square of each.
        self.cuts: dict[tuple[Cut, int], tuple[list[int], list[int]]] = {}
        self.last: tuple[list[np.ndarray] | None, dict[int, int]] = (None, {})

    def add(self, row: int, bases: list[np.ndarray], view: int) -> None:
        """Make a row a view of a picture.

        Args:
            row: of the batch.
            bases: from `make_bases`; a picture's own list, by which its rows know each other.
            view: by position in the plan.
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
    """Places to index with; a slice, which copies nothing, where they follow each other."""
    first, count = places[0], len(places)
    return slice(first, first + count) if places == list(range(first, first + count)) else places
