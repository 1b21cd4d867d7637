"""Build a cache: the run of one process around the functions of `vfmtok_fast.cache.make.job`.

Processes share the work without communicating: each makes its own shards, then whatever is still
missing. Work may be done twice if a process is slow or dies, but the result is never wrong, because
a shard has the same bytes whoever writes it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...images import quiet_pillow
from ..format.fingerprint import Tokenizer
from ..store import Place
from .job import Job, encode_shards, finish, finished, pending
from .prepare import prepare
from .progress import Progress, State, reporting
from .spec import CacheSpec, check_count


@dataclass(frozen=True)
class Summary:
    """What `build` did.

    Args:
        out: the cache.
        images: images in the cache, bad ones included.
        bad: quarantined images; those of the finished shards if not all are finished.
        shards: shards in the cache.
        encoded: images encoded by this run; 0 if the cache was already complete.
        seconds: how long this run took.
        missing: shards still to be made; 0 for a complete cache.
    """

    out: Place
    images: int
    bad: int
    shards: int
    encoded: int
    seconds: float
    missing: int = 0

    @property
    def exit_code(self) -> int:
        """0: done; 3: done, with quarantined images."""
        return 3 if self.bad else 0


def build(
    images: str | os.PathLike, out: str | os.PathLike, tokenizer: Tokenizer,
    spec: CacheSpec | None = None, *, max_bad: int | None = None, rank: int = 0,
    world_size: int = 1, shard_range: tuple[int, int | None] | None = None,
    progress: bool | Callable[[Progress], None] = False, **settings: Any,
) -> Summary:  # fmt: skip
    """Encode every image of an input into a token cache, or resume one that was interrupted.

    The run may be killed at any moment. The next call with the same arguments resumes where it
    stopped, and the result has the same bytes. During the call, SIGTERM becomes SystemExit(143),
    unless the program has set a handler of its own.

    Args:
        images: folder of class folders of images, or an archive (see
            `vfmtok_fast.cache.sources.open_source`).
        out: the cache: a new or empty folder, or a cache made with the same settings. May be a URL
            that fsspec knows (s3://bucket/tokens).
        tokenizer: see `vfmtok_fast.cache.format.fingerprint.Tokenizer`.
        spec: the settings; or give its fields by name, as in ``views=("center", "center-flip")``.
        max_bad: give up when more images than this have to be quarantined; None: never.
        rank, world_size: rank of this process and number of processes; each makes its share of the
            shards, then what the others have not done. Both may differ from run to run.
        shard_range: (A, B): only the shards A to B - 1, for batch systems; B None: to the end.
        progress: True for a bar on stderr (shown only if that is a terminal), or a function that is
            called after each batch.
        settings: fields of `CacheSpec`, which override those in ``spec``.

    Returns:
        Counts, and the matching exit code.

    Raises:
        FileNotFoundError, NotADirectoryError: `images` does not exist, or disappeared meanwhile.
        FileExistsError: `out` holds something else; FingerprintMismatch: a cache made with other
            settings.
        ValueError, TypeError: wrong arguments; no image, or none that can be read; images changed
            since they were indexed (ImagesChanged); invalid tokens (TokenError).
        TooManyBadImages: more than `max_bad`; finished shards are kept.
        CacheWriteError: disk full, folder read-only and the like; finished shards are kept.
    """
    started = time.monotonic()
    if max_bad is not None:
        check_count("max_bad", max_bad, 0)
    check_count("world_size", world_size, 1)
    check_count("rank", rank, 0)
    if rank >= world_size:
        raise ValueError(f"cache: rank must be below world_size, got {rank} of {world_size}")
    with quiet_pillow(), exit_on_sigterm():
        job = prepare(images, out, tokenizer, CacheSpec.of(spec, settings), rank=rank)
        numbers = _numbers(job, shard_range)
        state = _encode(job, numbers, rank, world_size, max_bad, progress)
        missing = len(pending(job)) if shard_range else 0
        bad = state.progress().bad if missing else finish(job)
    seconds = time.monotonic() - started
    found = job.manifest
    return Summary(job.out, found.images, bad, found.shards, state.encoded, seconds, missing)


def _encode(
    job: Job, numbers: range, rank: int, world_size: int, max_bad: int | None,
    progress: bool | Callable[[Progress], None],
) -> State:  # fmt: skip
    """Encode the missing shards of this process, then those that no other process has made."""
    state = State(job, max_bad)
    own = _share(state.unseen(numbers), rank, world_size)
    others = sorted(set(numbers) - set(own), reverse=True)
    with reporting(progress, job.manifest.images, state.progress().done) as report:

        def advance(number: int, new: int, bad: int) -> None:
            state.advance(number, new, bad)
            report(state.progress())

        encode_shards(job, state.missing(own), advance, state.waits)
        state.wait_for(state.unseen(others))
        left = [number for number in others if finished(job, number) is None]
        left = _turned(left, rank, world_size)
        encode_shards(job, state.missing(left), advance, state.waits)
        state.refresh()
        report(state.progress())
    return state


def _numbers(job: Job, shard_range: tuple[int, int | None] | None) -> range:
    every = range(job.manifest.shards)
    if shard_range is None:
        return every
    first, end = shard_range
    if not 0 <= first < len(every) or (end is not None and end <= first):
        raise ValueError(
            f"cache: shard_range must be A:B with 0 <= A < B and A below {len(every)}, the number "
            f"of shards, got {first}:{'' if end is None else end}"
        )
    return every[first:end]


def _share(numbers: list[int], rank: int, world_size: int) -> list[int]:
    """Return the shards that a process makes first: neighbours, which lie together in the input.

    If a row group of a Parquet file is larger than a shard, whoever makes the next shard reads on,
    but whoever makes a later one reads the row group from its start.
    """
    first, end = (len(numbers) * place // world_size for place in (rank, rank + 1))
    return numbers[first:end]


def _turned(numbers: list[int], rank: int, world_size: int) -> list[int]:
    """Return what others have left, which is in descending order, as a process makes it.

    From the end, because a process that is still running makes its own shards from the start; and
    rotated by rank, so that not all processes take the same shard.
    """
    turn = rank * len(numbers) // world_size
    return numbers[turn:] + numbers[:turn]


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, sent by schedulers to stop a job, unwind the stack to remove temporary files."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
