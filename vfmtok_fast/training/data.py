"""Pictures to train on: random crops of any input that a token cache reads.

The order of an epoch, and the crop and mirroring of a picture in it, follow from seed, epoch and
path alone. A step takes the next batch of the whole order, whatever the number of processes, each
of which takes its share of it; so the step's number says where a run stands.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cache.format.views import View, make_views
from ..cache.sources import BadImage, Source
from ..images import center_crop, decode_image

# Batches that are read while one is trained on.
AHEAD = 2
# Pictures in a row that may be bad.
MOST_BAD = 100


@dataclass
class Batch:
    """8-bit crops [B, S, S, 3] and the paths of their pictures."""

    images: Tensor
    paths: list[str]


class Pictures:
    """An input's pictures, epoch after epoch.

    A crop is the authors': the short side scaled to a whole number of ``size`` to ceil(size / 0.8)
    pixels, a square at a random place, every other one mirrored. A picture that cannot be read is
    noted in ``bad``, and the one that follows it in the input takes its place.

    Args:
        source: from `vfmtok_fast.cache.sources.open_source`.
        batch_size: pictures a step, of all processes; what does not fill one at the end of an epoch
            is left out.
        size: of the crops.
        seed: of order and crops.
        workers: threads that read.
        rank, world_size: which of how many processes this is.

    Raises:
        ValueError: fewer pictures than a batch, or one that the processes cannot share.
    """

    def __init__(
        self, source: Source, batch_size: int, *, size: int = 336, seed: int = 0, workers: int = 4,
        rank: int = 0, world_size: int = 1,
    ):  # fmt: skip
        self.source, self.batch_size, self.size, self.seed = source, batch_size, size, seed
        self.workers, self.rank, self.world_size = workers, rank, world_size
        self.entries = list(source.entries())
        self.bad: dict[str, str] = {}
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"training: {world_size} processes cannot share a batch of {batch_size}; choose a "
                "multiple of them"
            )
        if len(self.entries) < batch_size:
            raise ValueError(
                f"{source.root}: {len(self.entries)} pictures are fewer than a batch of "
                f"{batch_size}"
            )
        self.steps_per_epoch = len(self.entries) // batch_size
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def batches(self, done: int) -> Iterator[Batch]:
        """This process's share of the batches from step ``done`` + 1 on, without end."""
        pool = ThreadPoolExecutor(self.workers, "vfmtok-pictures")
        ahead: deque[list[Future]] = deque()
        try:
            while True:
                while len(ahead) <= AHEAD:
                    epoch = done // self.steps_per_epoch
                    places = self._places(done)
                    ahead.append([pool.submit(self._crop, place, epoch) for place in places])
                    done += 1
                found = [future.result() for future in ahead.popleft()]
                crops, paths = zip(*found, strict=True)
                yield Batch(torch.from_numpy(np.stack(crops)), list(paths))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _places(self, done: int) -> list[int]:
        epoch, number = divmod(done, self.steps_per_epoch)
        if self._order[0] != epoch:
            order = torch.randperm(
                len(self.entries), generator=torch.Generator().manual_seed(self._hash(epoch))
            )
            self._order = epoch, order.numpy()
        start = number * self.batch_size
        batch = self._order[1][start : start + self.batch_size]
        return batch[self.rank :: self.world_size].tolist()

    def centre(self, place: int) -> np.ndarray:
        """The middle of a picture, to be shown: uint8 [S, S, 3]."""
        return self._read(place, lambda image, path: center_crop(image, self.size))[0]

    def _crop(self, place: int, epoch: int) -> tuple[np.ndarray, str]:
        def cut(image: Image.Image, path: str) -> np.ndarray:
            view = View("random", epoch, flip=self._hash(epoch, path) % 2 == 1)
            return make_views(image, (view,), self.size, path=path, seed=self.seed)[0]

        return self._read(place, cut)

    def _read(
        self, place: int, cut: Callable[[Image.Image, str], np.ndarray]
    ) -> tuple[np.ndarray, str]:
        for number in range(MOST_BAD):
            entry = self.entries[(place + number) % len(self.entries)]
            try:
                return cut(decode_image(self.source.read(entry)), entry.path), entry.path
            except (BadImage, ValueError) as error:
                self.bad[entry.path] = str(error)
        raise ValueError(
            f"{self.source.root}: {MOST_BAD} pictures in a row cannot be read; the last is "
            f"{entry.path!r}: {self.bad[entry.path]}"
        )

    def _hash(self, *parts: object) -> int:
        text = "\0".join(map(str, ("vfmtok_fast training", self.seed, *parts)))
        digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
        return int.from_bytes(digest[:8], "little", signed=True)
