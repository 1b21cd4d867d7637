"""Pictures to tokens: the one way in which every worker, and `verify`, encodes.

Threads read, decode and crop ahead of the tokenizer (Pillow lets go of the interpreter lock), a
bounded number of pictures at a time. Batches are cut by position: row r of a shard is view r % V of
picture r // V, batch b is rows [b*B, (b+1)*B), padded with black at the end of the shard. A bad
picture stays in its place as black, so the tokens of one picture never depend on whether another
one could be read, nor on the number of workers.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..images import decode_image, to_float
from .index import NO_SIZE, NOT_UTF8, Rows
from .manifest import BAD_TOKEN, Manifest, Tokenizer
from .shards import BAD, GONE
from .views import View, make_views, parse_views

# Called after each batch with the number of pictures finished by it and how many of them are bad.
Advance = Callable[[int, int], None]

# Errors of one file; any other OSError (too many open files, stale network mount) is the machine's
# and ends the run, because quarantining on it would write it down for ever.
_ERRORS_OF_A_FILE = frozenset(
    {errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO, errno.EISDIR, errno.ENAMETOOLONG}
)


class TokenError(ValueError):
    """The tokenizer returned something that is not [B, T] tokens below codebook_size."""


class _BadImage(Exception):
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass
class Encoded:
    """Tokens uint16 [n, V, T] and status uint8 [n] of n pictures; why the bad ones are bad."""

    tokens: np.ndarray
    status: np.ndarray
    reasons: dict[int, str]


def encode_rows(
    root: Path,
    rows: Rows,
    manifest: Manifest,
    tokenizer: Tokenizer,
    workers: int,
    advance: Advance | None = None,
) -> Encoded:
    """Encode a run of pictures that starts where a batch starts.

    Args:
        root: the image folder.
        rows: n rows of the index; the first must lie at a batch boundary of its shard, or tokens
            that are nearly tied may differ from the shard's.
        manifest: views, sizes and batch size.
        tokenizer: see `Tokenizer`; put into eval mode for the time of the call.
        workers: threads that read and decode.
        advance: told after each batch.

    Returns:
        Tokens, status and, by position in `rows`, the reason why a picture is bad.

    Raises:
        TokenError: the tokenizer's answer has another shape or is out of range.
        FileNotFoundError: a whole folder of pictures has gone.
        OSError: reading failed for a reason that lies with the machine.
    """
    views, batch_size = parse_views(manifest.views), manifest.batch_size
    encoded = Encoded(
        np.full((len(rows), len(views), manifest.num_tokens), BAD_TOKEN, np.uint16),
        np.zeros(len(rows), np.uint8),
        {},
    )
    flat = encoded.tokens.reshape(-1, manifest.num_tokens)
    batch = _empty_batch(manifest)
    good: list[int] = []  # rows of the current batch that hold a picture
    finished = bad = row = 0

    def flush() -> None:
        nonlocal batch, good, finished, bad
        if good:
            tokens = _encode_batch(tokenizer, batch, manifest)
            flat[good] = tokens[[r % batch_size for r in good]]
        batch, good = _empty_batch(manifest), []
        if advance is not None:
            advance(finished, bad)
        finished = bad = 0

    with _evaluating(tokenizer):
        for position, crops in enumerate(_decode_ahead(root, rows, manifest, views, workers)):
            if isinstance(crops, _BadImage):
                encoded.status[position] = crops.status
                encoded.reasons[position] = str(crops)
                bad += 1
            for view in range(len(views)):
                if not isinstance(crops, _BadImage):
                    batch[row % batch_size] = crops[view]
                    good.append(row)
                row += 1
                finished += view == len(views) - 1
                if row % batch_size == 0:
                    flush()
        if row % batch_size:
            flush()
    return encoded


def _empty_batch(manifest: Manifest) -> np.ndarray:
    side = manifest.image_size
    return np.zeros((manifest.batch_size, side, side, 3), np.uint8)


def _encode_batch(tokenizer: Tokenizer, batch: np.ndarray, manifest: Manifest) -> np.ndarray:
    """uint8 [B, side, side, 3] -> uint16 [B, T], checked."""
    first = next(iter(tokenizer.parameters()), torch.empty(0))
    with torch.inference_mode():
        # 8-bit to the device (a quarter of the bytes), float there; to_float is exact everywhere.
        images = to_float(torch.from_numpy(batch).to(first.device)).to(first.dtype)
        tokens = tokenizer.encode(images)
    expected = (manifest.batch_size, manifest.num_tokens)
    if tuple(tokens.shape) != expected or tokens.is_floating_point() or tokens.is_complex():
        raise TokenError(
            f"tokenizer.encode must return integers of shape {list(expected)}, "
            f"got {tokens.dtype} {list(tokens.shape)}"
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= manifest.codebook_size:
        raise TokenError(
            f"tokenizer.encode must return tokens of 0 to {manifest.codebook_size - 1}, "
            f"got {low if low < 0 else high}; nothing was written for this shard"
        )
    return tokens.cpu().numpy().astype(np.uint16)


@contextlib.contextmanager
def _evaluating(tokenizer: Tokenizer) -> Iterator[None]:
    training = getattr(tokenizer, "training", False)
    if training:
        tokenizer.eval()
    try:
        yield
    finally:
        if training:
            tokenizer.train()


def _decode_ahead(
    root: Path, rows: Rows, manifest: Manifest, views: tuple[View, ...], workers: int
) -> Iterator[np.ndarray | _BadImage]:
    """The pictures' views in order, decoded by threads at most two batches ahead."""
    window = -(-2 * manifest.batch_size // len(views)) + workers
    waiting: deque[Future] = deque()
    todo = zip(rows.paths, rows.sizes, strict=True)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vfmtok-decode")
    try:
        for _ in range(len(rows)):
            while len(waiting) < window and (item := next(todo, None)) is not None:
                waiting.append(pool.submit(_crops, root, *item, views, manifest.image_size))
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _crops(
    root: Path, name: str, size: int, views: tuple[View, ...], side: int
) -> np.ndarray | _BadImage:
    """uint8 [V, side, side, 3], or why there is none."""
    try:
        return make_views(decode_image(_read(root, name, size)), views, side)
    except _BadImage as bad:
        return bad
    except ValueError as error:
        return _BadImage(BAD, str(error))


def _read(root: Path, name: str, size: int) -> bytes:
    """The bytes of an indexed file; reasons hold no path, so that they are the same everywhere."""
    if size == NOT_UTF8:
        raise _BadImage(BAD, "its name is not UTF-8; rename it")
    path = root / name
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _BadImage(GONE, "no longer a regular file")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"{path.parent}: this folder has gone since it was indexed; "
                "bring it back and run again (finished shards are kept)"
            ) from error
        if size == NO_SIZE:
            raise _BadImage(BAD, "a link to a file that does not exist") from error
        raise _BadImage(GONE, "gone since it was indexed") from error
    except OSError as error:
        if error.errno not in _ERRORS_OF_A_FILE:
            raise
        raise _BadImage(BAD, f"cannot be opened: {error.strerror}") from error
    if len(data) != size:
        raise _BadImage(GONE, f"changed since it was indexed: {size} bytes then, {len(data)} now")
    if not data:
        raise _BadImage(BAD, "empty file")
    return data
