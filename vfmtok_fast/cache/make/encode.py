"""Images to tokens: the one way in which every worker, and `verify`, encodes.

Three things overlap. Threads read, decode and resize ahead (Pillow releases the GIL), also across
the end of a shard. A thread runs the tokenizer; on a GPU, two threads take turns. The caller's
thread fills the next batch. A bounded number of images is in memory.

Batches are cut by position: row r of a shard is view r % V of image r // V, and batch b is rows
[b*B, (b+1)*B), padded with black at the end of the shard. A bad image keeps its place as black, so
the tokens of one image never depend on whether another one could be read, nor on the number of
workers.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ...images import decode_image
from ..format.crops import make_bases
from ..format.fingerprint import Tokenizer, first_parameter
from ..format.index import Rows
from ..format.manifest import BAD_TOKEN, Manifest
from ..format.shards import BAD
from ..format.views import Plan, parse_views, plan_views
from ..sources import BadImage, Entry, Source
from .ahead import ahead
from .batch import Batch, as_index

# Called after each batch with the shard's number, how many of its images that batch finished, and
# how many of those are bad.
Advance = Callable[[int, int, int], None]


@dataclass
class Waits:
    """Seconds that the run spent waiting: for images to be decoded, and for the tokenizer."""

    data: float = 0.0
    device: float = 0.0


class TokenError(ValueError):
    """The tokenizer returned something other than [B, T] tokens below codebook_size."""


@dataclass
class Encoded:
    """Tokens uint16 [n, V, T] and status uint8 [n] of n images; why the bad ones are bad."""

    tokens: np.ndarray
    status: np.ndarray
    reasons: dict[int, str]


def encode_rows(
    source: Source, rows: Rows, manifest: Manifest, tokenizer: Tokenizer, workers: int
) -> Encoded:
    """Encode a run of images that starts at a batch boundary; like `encode_parts`, for one part.

    The first row must be at a batch boundary of its shard. Otherwise, tokens that are nearly tied
    may differ from the shard's.
    """
    ((_, _, encoded),) = encode_parts(source, [(0, rows)], manifest, tokenizer, workers)
    return encoded


def encode_parts(
    source: Source, parts: Iterable[tuple[int, Rows]], manifest: Manifest, tokenizer: Tokenizer,
    workers: int, advance: Advance | None = None, waits: Waits | None = None,
) -> Iterator[tuple[int, Rows, Encoded]]:  # fmt: skip
    """Encode shards, or runs of images that start at a batch boundary.

    Args:
        source: the input that the rows came from.
        parts: number and rows of each part; taken one by one, when decoding gets there.
        manifest: views, sizes and batch size.
        tokenizer: see `Tokenizer`; put into eval mode during the call.
        workers: threads that read and decode.
        advance: called after each batch.
        waits: waiting times are added to it.

    Yields:
        Number and rows of each part, and its tokens, status and, by position in the rows, the
        reason why an image is bad.

    Raises:
        TokenError: the tokenizer's output has another shape or is out of range.
        FileNotFoundError: a whole folder or archive of images is gone.
        OSError: reading failed because of the machine, not because of an image.
    """
    plan = plan_views(parse_views(manifest.views), manifest.image_size)
    advance = advance or (lambda number, new, bad: None)
    device = _Device(tokenizer, manifest, plan, waits or Waits())
    pictures = _decode_ahead(source, parts, manifest, plan, workers)
    views, size = len(plan.cuts), manifest.batch_size
    with evaluating(tokenizer), contextlib.closing(device), contextlib.closing(pictures):
        while (part := device.wait_for_data(pictures)) is not None:
            number, rows = part
            encoded = Encoded(
                np.full((len(rows), views, manifest.num_tokens), BAD_TOKEN, np.uint16),
                np.zeros(len(rows), np.uint8),
                {},
            )
            flat = encoded.tokens.reshape(-1, manifest.num_tokens)
            for start in range(0, len(flat), size):
                end, good, bad = min(start + size, len(flat)), [], 0
                for row in range(start, end):
                    position, view = divmod(row, views)
                    if view == 0:
                        picture = device.wait_for_data(pictures)
                        if isinstance(picture, BadImage):
                            encoded.status[position] = picture.status
                            encoded.reasons[position] = str(picture)
                            bad += 1
                    if not isinstance(picture, BadImage):
                        device.batches[0].add(row - start, picture, view)
                        good.append(row)
                finished = end // views - start // views
                device.send(good, flat, partial(advance, number, finished, bad))
            while device.running:
                device.receive()
            yield number, rows, encoded


# Batches encoded at a time. On a GPU each has a stream: one batch's copy, checks and kernel
# launches, during which host and device wait for each other, overlap with the other batch's work.
IN_FLIGHT = defaultdict(lambda: 1, cuda=2)
_kept = threading.local()
# Streams of finished runs, reused by later ones: a model's CUDA graphs belong to a stream.
_idle: defaultdict[torch.device, list[torch.cuda.Stream]] = defaultdict(list)


def _own_stream(streams: list[torch.cuda.Stream]) -> None:
    """Give this thread its own stream; a new thread starts on GPU 0, whatever its parent uses."""
    _kept.stream = streams.pop() if streams else None


class _Device:
    """Batches on their way to the tokenizer: one is filled while others are encoded."""

    def __init__(self, tokenizer: Tokenizer, manifest: Manifest, plan: Plan, waits: Waits) -> None:
        self.tokenizer, self.manifest, self.waits = tokenizer, manifest, waits
        first = first_parameter(tokenizer)
        self.in_flight = IN_FLIGHT[first.device.type]
        # Pinned, so that the copy to a GPU overlaps with everything else.
        self.batches = deque(
            Batch(plan, manifest.batch_size, first.is_cuda) for _ in range(self.in_flight + 1)
        )
        self.idle = _idle[first.device]
        self.streams = [
            self._stream(first.device) for _ in range(self.in_flight if first.is_cuda else 0)
        ]
        self.threads = ThreadPoolExecutor(
            self.in_flight, "vfmtok-encode", _own_stream, (list(self.streams),)
        )
        self.running: deque[tuple[Future | None, list[int], np.ndarray, Callable]] = deque()
        self.warm = False

    def close(self) -> None:
        self.threads.shutdown(wait=True, cancel_futures=True)
        # Reversed, so that the next run's threads get the streams in the same order.
        self.idle += reversed(self.streams)

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        try:
            stream = self.idle.pop()
        except IndexError:
            stream = torch.cuda.Stream(device)
        # The caller may just have changed the weights.
        stream.wait_stream(torch.cuda.current_stream(device))
        return stream

    def wait_for_data(self, pictures: Iterator) -> Any:
        start = time.perf_counter()
        found = next(pictures, None)
        self.waits.data += time.perf_counter() - start
        return found

    def send(self, rows: list[int], flat: np.ndarray, done: Callable[[], None]) -> None:
        """Start encoding the first batch, which holds `rows` of `flat`; then `done` is called."""
        # The first batch runs alone: two threads would compile the same kernels.
        while len(self.running) >= (self.in_flight if self.warm else 1):
            self.receive()
        future = None
        if rows:
            batch = self.batches[0]
            future = self.threads.submit(_encode_batch, self.tokenizer, batch, self.manifest)
        self.running.append((future, rows, flat, done))
        self.batches.rotate(-1)
        self.batches[0].clear()

    def receive(self) -> None:
        future, rows, flat, done = self.running.popleft()
        if future is not None:
            self.warm = True
            start = time.perf_counter()
            tokens = future.result()
            self.waits.device += time.perf_counter() - start
            places = [row % self.manifest.batch_size for row in rows]
            flat[as_index(rows)] = tokens[as_index(places)]
        done()


def _encode_batch(tokenizer: Tokenizer, batch: Batch, manifest: Manifest) -> np.ndarray:
    """Encode a batch and check the tokens; uint16 [B, T]."""
    first = first_parameter(tokenizer)
    # On a CPU the stream is None. On a GPU, it also makes its device the current one.
    with torch.cuda.stream(_kept.stream), torch.inference_mode():
        # A tokenizer in mixed precision states its input dtype.
        dtype = getattr(tokenizer, "dtype", first.dtype)
        tokens = tokenizer.encode(batch.to(first.device).to(dtype))
    expected = (manifest.batch_size, manifest.num_tokens)
    if tuple(tokens.shape) != expected or tokens.is_floating_point() or tokens.is_complex():
        raise TokenError(
            f"tokenizer.encode must return integers of shape {list(expected)}, "
            f"got {tokens.dtype} {list(tokens.shape)}"
        )
    # Wait for the device once, not once per check.
    tokens = tokens.cpu().numpy()
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= manifest.codebook_size:
        raise TokenError(
            f"tokenizer.encode must return tokens from 0 to {manifest.codebook_size - 1}, "
            f"got {low if low < 0 else high}; nothing was written for this shard"
        )
    return tokens.astype(np.uint16)


@contextlib.contextmanager
def evaluating(tokenizer: Tokenizer) -> Iterator[None]:
    """Put a tokenizer into eval mode for the duration of the block."""
    training = getattr(tokenizer, "training", False)
    if training:
        tokenizer.eval()
    try:
        yield
    finally:
        if training:
            tokenizer.train()


def _decode_ahead(
    source: Source, parts: Iterable[tuple[int, Rows]], manifest: Manifest, plan: Plan, workers: int
) -> Iterator[tuple[int, Rows] | list[np.ndarray] | BadImage]:
    """Yield each part, then its images in order, decoded by threads up to a batch ahead."""

    def decoded(item: tuple[int, Rows] | Entry) -> Any:
        return decode(source, item, plan, manifest) if isinstance(item, Entry) else item

    items = (item for part in parts for item in (part, *part[1].entries))
    window = -(-manifest.batch_size // len(plan.cuts)) + workers
    return ahead(decoded, items, workers, window, "vfmtok-decode")


def decode(
    source: Source, entry: Entry, plan: Plan, manifest: Manifest
) -> list[np.ndarray] | BadImage:
    """Return what `make_bases` makes of an image, or why it cannot be read."""
    try:
        data = source.read(entry)
    except BadImage as bad:
        return bad
    # Separate from reading: a ValueError there concerns the input as a whole and ends the run.
    try:
        return make_bases(decode_image(data), plan, path=entry.path, seed=manifest.seed)
    except ValueError as error:
        return BadImage(BAD, str(error))
