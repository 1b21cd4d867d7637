"""Images of any input that a token cache reads, cropped and resized as a protocol says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..cache.format.index import NO_CLASS, Entry
from ..cache.sources import BadImage, Source
from ..cache.sources.base import REASONS
from ..images import center_crop, decode_image, to_float, to_uint8

# Number of images that are checked before the work begins.
LOOKED_AT = 8


class Batch(NamedTuple):
    """Squares for the tokenizer [B, S, S, 3], the original images or None, and labels int64 [B]."""

    squares: np.ndarray
    originals: np.ndarray | None
    labels: np.ndarray


class Pictures:
    """Some or all images of an input, in its order.

    Args:
        source: returned by `cache.sources.open_source`.
        side: side of the squares, in pixels.
        num: how many images, evenly spaced in the input's order; None: all.
        crop: "centre": crop raw images. "none": images are squares of ``size`` pixels already and
            are enlarged.
        size: see ``crop``; raw images that are all squares of this size are refused.
        workers: number of reader threads.
        labelled: refuse images without a class.

    Raises:
        ValueError: there are fewer images than asked for, one has no class, or they are cropped
            already.
    """

    def __init__(
        self, source: Source, side: int, *, num: int | None = None, crop: str = "centre",
        size: int | None = None, workers: int = 4, labelled: bool = False,
    ):  # fmt: skip
        self.source, self.side, self.crop, self.size = source, side, crop, size
        self.workers = workers
        self.bad: dict[str, str] = {}
        entries = list(source.entries())
        num = len(entries) if num is None else num
        if not 0 < num <= len(entries):
            evaluates = f"; --num {len(entries)} evaluates those, and says so" if entries else ""
            raise ValueError(
                f"{source.shown}: {num} pictures were asked for, it holds {len(entries)}{evaluates}"
            )
        self.entries = [entries[i * len(entries) // num] for i in range(num)]
        # An entry with a damaged label is left out as a bad image, as in training.
        without = [e.path for e in self.entries if e.label == NO_CLASS and e.size not in REASONS]
        if labelled and without:
            raise ValueError(
                f"{source.shown}: {len(without)} pictures have no label, such as {without[0]!r}; "
                "a probe needs a class for each"
            )
        if crop == "centre" and size is not None and size < side:
            self._refuse_crops()

    def __len__(self) -> int:
        return len(self.entries)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield the images; those that cannot be read are left out and noted in ``bad``."""
        with ThreadPoolExecutor(self.workers, "vfmtok-evaluate") as pool:
            waiting: list[Future] = []
            for start in range(0, len(self.entries) + batch_size, batch_size):
                some = self.entries[start : start + batch_size]
                coming = [pool.submit(self._read, entry) for entry in some]
                found = [future.result() for future in waiting]
                if kept := [one for one in found if one is not None]:
                    squares, originals, labels = zip(*kept, strict=True)
                    yield Batch(
                        np.stack(squares),
                        None if originals[0] is None else np.stack(originals),
                        np.array(labels, np.int64),
                    )
                waiting = coming

    def _read(self, entry: Entry) -> tuple[np.ndarray, np.ndarray | None, int] | None:
        try:
            image = decode_image(self.source.read(entry))
            if self.crop == "centre":
                return center_crop(image, self.side), None, entry.label
        except (BadImage, ValueError) as error:
            self.bad[entry.path] = str(error)
            return None
        if image.size != (self.size, self.size):
            raise ValueError(
                f"{entry.path}: has {image.width}x{image.height} pixels, this protocol takes crops "
                f"of {self.size}x{self.size}; raw pictures need --protocol reconstruction-vfmtok"
            )
        square = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return np.asarray(square), np.asarray(image), entry.label

    def _refuse_crops(self) -> None:
        sizes = set()
        for entry in self.entries[:: -(-len(self.entries) // LOOKED_AT)]:
            with contextlib.suppress(BadImage, ValueError):
                sizes.add(decode_image(self.source.read(entry)).size)
        if sizes == {(self.size, self.size)}:
            raise ValueError(
                f"{self.source.shown}: the pictures are {self.size}x{self.size} crops already, not "
                "what the authors cut theirs from; --protocol reconstruction-crops takes them"
            )


def compared(images: Tensor, size: int, resize: str) -> np.ndarray:
    """Convert images to 8 bits at the size at which they are compared.

    Args:
        images: floating [B, 3, S, S] in [-1, 1]; values outside are clamped.
        size: pixels a side.
        resize: "pillow": bicubic with antialiasing, on 8-bit images; "torch": bicubic without
            antialiasing, on floating-point images.

    Returns:
        uint8 [B, size, size, 3].
    """
    if resize == "torch":
        images = F.interpolate(images.float(), size=(size, size), mode="bicubic")
    pictures = to_uint8(images).cpu().numpy()
    if pictures.shape[1] == size:
        return pictures
    return np.stack(
        [
            np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC))
            for one in pictures
        ]
    )


def model_input(squares: np.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Convert 8-bit squares to the tokenizer's input."""
    return to_float(torch.from_numpy(squares).to(device)).to(dtype)
