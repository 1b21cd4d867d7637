"""A cache as a data set for training: one view of each image per epoch, or all of them.

Which view an image shows in an epoch depends only on the seed, the epoch and the image, and not on
the number of processes, the batch or the order.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable
from typing import Any, Self

import torch

from .reader import TokenCache

CHOICES = ("one", "each", "all")


class TokenCacheDataset(torch.utils.data.Dataset):
    """The readable images of a cache as (tokens, label), for `torch.utils.data.DataLoader`.

    Tokens are read on demand, so memory use is a few bytes per image. The data set can be sent to
    worker processes. `set_epoch` reaches them too, also persistent ones
    (`persistent_workers=True`), and any other process that torch.multiprocessing sends the data set
    to. A copy, by `copy` or pickle, has an epoch of its own, which starts as this one's.

    Args:
        out: the cache's folder.
        views: names of views to take, in this order (`ten-crop` and `random-A..B` stand for
            several); None: all of the cache.
        per_picture: "one": one view of each image, drawn anew each epoch, tokens [T]; "each":
            every view of each image is an item, tokens [T]; "all": all views at once, [V, T].
        seed: seed of the draws.
        partial: accept a cache that is not complete, and take its finished shards.
        mirror: for a cache in a store: see `TokenCache`.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the cache is damaged, incomplete (without `partial`), or lacks a view.
    """

    def __init__(
        self, out: str | os.PathLike, views: Iterable[str] | None = None, *,
        per_picture: str = "one", seed: int = 0, partial: bool = False,
        mirror: str | os.PathLike | None = None,
    ) -> None:  # fmt: skip
        if per_picture not in CHOICES:
            raise ValueError(f"per_picture must be one of {', '.join(CHOICES)}, got {per_picture}")
        self.cache = TokenCache(out, partial=partial, mirror=mirror)
        self.per_picture, self.seed = per_picture, operator.index(seed)
        self._places = self.cache.manifest.places_of(views, out)
        self.views = [self.cache.manifest.views[place] for place in self._places]
        # In shared memory, so that persistent workers see a new epoch.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # torch shares memory with the processes that it starts itself. Any other copy, by pickle or
        # deepcopy, has an epoch of its own, which its workers must see.
        if not self._epoch.is_shared():
            self._epoch = self._epoch.clone().share_memory_()

    def __copy__(self) -> Self:
        # copy.copy would hand over the tensor itself.
        other = type(self).__new__(type(self))
        other.__dict__ |= {**self.__dict__, "_epoch": self._epoch.clone().share_memory_()}
        return other

    @property
    def epoch(self) -> int:
        """The epoch that `set_epoch` set; 0 at first."""
        return int(self._epoch)

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a label is a position in this list, -1 is none."""
        return self.cache.classes

    def set_epoch(self, epoch: int) -> None:
        """Draw new views from now on; call it before each epoch, as for a DistributedSampler."""
        self._epoch.fill_(operator.index(epoch))

    def __len__(self) -> int:
        return len(self.cache) * (len(self.views) if self.per_picture == "each" else 1)

    def __getitem__(self, item: int) -> tuple[torch.Tensor, int]:
        """Return tokens int64 [T], or [V, T] for "all", and the label."""
        item = operator.index(item)
        if not -len(self) <= item < len(self):
            raise IndexError(f"{self.cache.out}: has {len(self)} items, no item {item}")
        item %= len(self)
        picture, view = item, None
        if self.per_picture == "each":
            picture, view = divmod(item, len(self.views))
        elif self.per_picture == "one":
            view = self.view_of(picture)
        tokens, label = self.cache[picture]
        return tokens[self._places if view is None else self._places[view]], label

    def view_of(self, picture: int) -> int:
        """Return which of `views` an image (by position) shows in this epoch."""
        row = int(self.cache.rows[picture])
        return _mix(self.seed, self.epoch, row) % len(self.views)


def _mix(*numbers: int) -> int:
    """Hash integers to 64 bits: SplitMix64's finaliser after each."""
    state, mask = 0, 0xFFFFFFFFFFFFFFFF
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state
