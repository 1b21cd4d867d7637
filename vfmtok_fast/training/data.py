"""Training data: random crops of any input that a token cache reads, or the codes of a cache.

The order of an epoch, and each image's crop and mirroring (or view) in it, depend only on the seed,
the epoch and the image. Each step takes the next batch of this order, and each process takes its
share of the batch. The step number alone therefore determines how far a run is, whatever the number
of processes.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..cache import TokenCacheDataset
from ..cache.format.crops import make_views
from ..cache.format.views import View
from ..cache.sources import BadImage, Source
from ..cache.sources.base import REASONS
from ..cache.sources.parquet import ParquetSource
from ..images import center_crop, decode_image, to_float
from ..tokenizer import VFMTok
from . import processes

# Batches to read ahead while one is trained on.
AHEAD = 2
# Number of consecutive bad images at which reading fails.
MOST_BAD = 100
# Number of images shuffled together where only whole blocks can be read fast. With photos of 110 KB
# this takes twice 225 MB of memory.
WINDOW = 2048


@dataclass
class Batch:
    """The items of a step, their labels [B] int64 (-1: no label) and the names of the images."""

    items: Tensor
    labels: Tensor
    paths: list[str]


class Order:
    """Chooses the items of each step; every epoch is reshuffled and drops its last, partial batch.

    Args:
        count: number of items.
        blocks: block number of each item [count], if items of a block are read together. Blocks are
            shuffled, then items within windows of `WINDOW` items. None: all items are shuffled at
            once.
        batch_size: items per step, over all processes.
        seed: seed of the order.
        rank, world_size: rank of this process and number of processes.

    Raises:
        ValueError: there are fewer items than a batch holds, or the processes cannot share a batch
            equally.
    """

    def __init__(
        self, count: int, batch_size: int, *, blocks: np.ndarray | None = None, seed: int = 0,
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"training: {world_size} processes cannot share a batch of {batch_size}; choose a "
                "multiple of them"
            )
        if count < batch_size:
            raise ValueError(
                f"training: {count} pictures are fewer than a batch of {batch_size}; choose a "
                "batch size of at most that"
            )
        self.count, self.batch_size, self.seed, self.blocks = count, batch_size, seed, blocks
        self.rank, self.world_size = rank, world_size
        self.steps_per_epoch = count // batch_size
        self._of: tuple[int, np.ndarray] = (-1, np.empty(0))

    def epoch(self, done: int) -> int:
        """The epoch of the step that follows ``done`` steps."""
        return done // self.steps_per_epoch

    def places(self, done: int) -> list[int]:
        """This process's items in the step that follows ``done`` steps."""
        epoch, number = divmod(done, self.steps_per_epoch)
        if self._of[0] != epoch:
            self._of = epoch, self._shuffled(epoch)
        start = number * self.batch_size
        batch = self._of[1][start : start + self.batch_size]
        return batch[self.rank :: self.world_size].tolist()

    def _shuffled(self, epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(hashed(self.seed, epoch))
        order = torch.randperm(self.count, generator=generator).numpy()
        if self.blocks is None or self.count <= WINDOW:
            return order
        # Sort the shuffled items by the random rank of their block, then shuffle within windows.
        turn = torch.randperm(int(self.blocks.max()) + 1, generator=generator).numpy()
        order = order[np.argsort(turn[self.blocks[order]], kind="stable")]
        for start in range(0, self.count, WINDOW):
            window = order[start : start + WINDOW]
            window[:] = window[torch.randperm(len(window), generator=generator).numpy()]
        return order


class Pictures:
    """The images of an input, epoch after epoch.

    Crops are made as the authors make them: the short side is scaled to a random whole number of
    pixels from ``size`` to ceil(size / 0.8), a square is cut at a random place and mirrored with
    probability 1/2. An image that cannot be read is noted in ``bad``, and the next image of the
    input takes its place.

    Images in Parquet files are shuffled by row group, then among a few row groups at a time.

    Args:
        source: returned by `vfmtok_fast.cache.open_source`.
        batch_size, seed, rank, world_size: see `Order`; the seed also determines the crops.
        size: side of the crops, in pixels.
        workers: number of reader threads.

    Raises:
        ValueError: as for `Order`.
    """

    def __init__(
        self, source: Source, batch_size: int, *, size: int = 336, seed: int = 0, workers: int = 4,
        rank: int = 0, world_size: int = 1,
    ):  # fmt: skip
        self.source, self.size, self.seed, self.workers = source, size, seed, workers
        self.entries = list(source.entries())
        self.order = Order(
            len(self.entries), batch_size, blocks=self._blocks(), seed=seed, rank=rank,
            world_size=world_size,
        )  # fmt: skip
        self.bad: dict[str, str] = {}

    @property
    def sha256(self) -> str:
        """SHA-256 of the images' paths in the input and of their classes."""
        digest = hashlib.sha256()
        for entry in self.entries:
            line = f"{entry.path}\0{entry.label}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _blocks(self) -> np.ndarray | None:
        """Block numbers for Parquet, where reading a row takes as long as reading its row group."""
        if not isinstance(self.source, ParquetSource):
            return None
        size = self.source.read_blocks(kept=2 * WINDOW)
        blocks = [(entry.file, entry.offset // size) for entry in self.entries]
        numbers = {block: number for number, block in enumerate(dict.fromkeys(blocks))}
        return np.array([numbers[block] for block in blocks])

    def batches(self, done: int) -> Iterator[Batch]:
        """Yield this process's share of the batches from step ``done`` + 1 on, without end.

        Items are uint8 crops [B, S, S, 3].
        """
        pool = ThreadPoolExecutor(self.workers, "vfmtok-pictures")
        ahead: deque[list[Future]] = deque()
        try:
            while True:
                while len(ahead) <= AHEAD:
                    epoch, places = self.order.epoch(done), self.order.places(done)
                    ahead.append([pool.submit(self._crop, place, epoch) for place in places])
                    done += 1
                found = [future.result() for future in ahead.popleft()]
                crops, labels, paths = zip(*found, strict=True)
                yield Batch(torch.from_numpy(np.stack(crops)), torch.tensor(labels), list(paths))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def arguments(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
        """Return the arguments for the trainer's ``step``."""
        return (to_float(batch.items.to(device)),)

    def progress(self, images: int) -> dict[str, float]:
        """Return progress figures after so many images; all processes must call this."""
        self.bad.update(processes.gather(list(self.bad.items())))
        return {"bad_pictures": len(self.bad)}

    def centre(self, place: int) -> np.ndarray:
        """The centre crop of an image, for display: uint8 [S, S, 3]."""
        return self._read(place, lambda image, path: center_crop(image, self.size))[0]

    def _crop(self, place: int, epoch: int) -> tuple[np.ndarray, int, str]:
        def cut(image: Image.Image, path: str) -> np.ndarray:
            view = View("random", epoch, flip=hashed(self.seed, epoch, path) % 2 == 1)
            return make_views(image, (view,), self.size, path=path, seed=self.seed)[0]

        return self._read(place, cut)

    def _read(
        self, place: int, cut: Callable[[Image.Image, str], np.ndarray]
    ) -> tuple[np.ndarray, int, str]:
        for number in range(MOST_BAD):
            entry = self.entries[(place + number) % len(self.entries)]
            try:
                image = decode_image(self.source.read(entry))
                return cut(image, entry.path), entry.label, entry.path
            except (BadImage, ValueError) as error:
                self.bad[entry.path] = str(error)
        raise ValueError(
            f"{self.source.root}: {MOST_BAD} pictures in a row cannot be read; the last is "
            f"{entry.path!r}: {self.bad[entry.path]}"
        )


class OnlineCodes:
    """Images that a tokenizer encodes at each step, as the authors do to train their generator.

    Args:
        pictures: images of the tokenizer's size, with classes.
        tokenizer: in eval mode, on the device to train on.
    """

    def __init__(self, pictures: Pictures, tokenizer: VFMTok) -> None:
        # A bad entry, including one with a bad label, is skipped later like any unreadable image.
        good = [entry for entry in pictures.entries if entry.size not in REASONS]
        check_labels(np.array([entry.label for entry in good]), pictures.source.root)
        self.pictures, self.tokenizer = pictures, tokenizer
        self.order = pictures.order

    def batches(self, done: int) -> Iterator[Batch]:
        """Yield the same batches as `Pictures.batches`."""
        return self.pictures.batches(done)

    def arguments(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
        """Return the codes and the class labels of a batch."""
        (images,) = self.pictures.arguments(batch, device)
        return self.tokenizer.encode(images), batch.labels.to(device)

    def progress(self, images: int) -> dict[str, float]:
        """Return the same figures as `Pictures.progress`."""
        return self.pictures.progress(images)

    @property
    def num_classes(self) -> int:
        highest = max(entry.label for entry in self.pictures.entries)
        return len(self.pictures.source.classes(highest))


class Codes:
    """The images of a token cache, epoch after epoch; each shows one of its views, drawn anew.

    Args:
        data: codes [R], one view of each image.
        batch_size, seed, rank, world_size: see `Order`.
        few: use only so many images, the first ones, each as a class of its own; None: all images,
            with the cache's classes.

    Raises:
        ValueError: as for `Order`; also if an image has no class, ``few`` exceeds the images, or
            ``data`` does not give one view per image.
    """

    def __init__(
        self, data: TokenCacheDataset, batch_size: int, *, few: int | None = None, seed: int = 0,
        rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        if data.per_picture != "one":
            raise ValueError(f'Codes: data must have per_picture="one", got "{data.per_picture}"')
        if few is None:
            check_labels(data.cache.labels, data.cache.out)
        elif few > len(data):
            raise ValueError(f"{data.cache.out}: has {len(data)} pictures, not {few}")
        self.data, self.few = data, few
        count = len(data) if few is None else few
        self.order = Order(count, batch_size, seed=seed, rank=rank, world_size=world_size)

    def batches(self, done: int) -> Iterator[Batch]:
        """Yield this process's share of the batches from step ``done`` + 1 on, without end.

        Items are codes [B, R] int64.
        """
        while True:
            if self.few is None:
                self.data.set_epoch(self.order.epoch(done))
            yield self.batch(self.order.places(done))
            done += 1

    def batch(self, places: Sequence[int]) -> Batch:
        """Return the images at the given places, in this epoch's views."""
        codes, labels = zip(*(self.data[place] for place in places), strict=True)
        labels = places if self.few is not None else labels
        names = [f"row {self.data.cache.rows[place]}" for place in places]
        return Batch(torch.stack(codes), torch.tensor(labels), names)

    @property
    def num_classes(self) -> int:
        return len(self.data.classes) if self.few is None else self.few

    def arguments(self, batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
        """Return the codes and the class labels of a batch."""
        return batch.items.to(device), batch.labels.to(device)

    def progress(self, images: int) -> dict[str, float]:
        """Return epochs in two counts: over the images, and over all sequences in the cache."""
        of_pictures = images / self.order.count
        return {"image_epochs": of_pictures, "sequence_epochs": of_pictures / len(self.data.views)}


def check_labels(labels: np.ndarray, where: object) -> None:
    """Refuse images without a class, since a generator cannot learn from them."""
    if without := int((labels < 0).sum()):
        raise ValueError(
            f"{where}: {without} of {len(labels)} pictures have no class; a generator needs "
            "one for each, as class folders provide"
        )


def hashed(*parts: object) -> int:
    text = "\0".join(map(str, ("vfmtok_fast training", *parts)))
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
