"""Building a cache in one process: the run around the functions of `vfmtok_fast.cache.job`."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..images import quiet_pillow
from . import shards
from .job import Job, check_count, encode_shard, finish, pending, prepare
from .manifest import Tokenizer


class TooManyBadImages(RuntimeError):
    """More pictures than `max_bad` had to be quarantined."""

    exit_code = 4


@dataclass(frozen=True)
class Progress:
    """How far a run is: pictures done, bad ones among them, pictures in all."""

    done: int
    bad: int
    total: int


@dataclass(frozen=True)
class Summary:
    """What `build` did.

    Args:
        out: the cache.
        images: pictures in the cache, bad ones included.
        bad: quarantined pictures.
        shards: shards in the cache.
        encoded: pictures encoded by this run; 0 if the cache was complete already.
        seconds: how long this run took.
    """

    out: Path
    images: int
    bad: int
    shards: int
    encoded: int
    seconds: float

    @property
    def exit_code(self) -> int:
        """0: complete; 3: complete, with quarantined pictures."""
        return 3 if self.bad else 0


def build(
    images: str | os.PathLike,
    out: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    views: Iterable[str] = ("center",),
    batch_size: int = 16,
    shard_size: int = 8192,
    max_bad: int | None = None,
    workers: int | None = None,
    progress: bool | Callable[[Progress], None] = False,
) -> Summary:
    """Encode every picture of a folder into a token cache, or go on with one that was interrupted.

    May be killed at any moment; the next call with the same arguments goes on where it stopped, and
    the result is the same bytes. SIGTERM is turned into SystemExit(143) for the time of the call,
    where the program has not set a handler of its own.

    Args:
        images: folder of class folders of pictures (see `vfmtok_fast.cache.index`).
        out: the cache; a new or empty folder, or a cache made with the same settings.
        tokenizer: see `vfmtok_fast.cache.manifest.Tokenizer`.
        views: names of views, see `vfmtok_fast.cache.views`.
        batch_size: views per call of `encode`, always padded to this.
        shard_size: pictures per shard.
        max_bad: give up when more pictures than this have to be quarantined; None: never.
        workers: threads that read and decode; None: one per CPU that this process may use, at
            most 8.
        progress: True for a bar on stderr (none where that is no terminal), or a function that is
            called after each batch.

    Returns:
        Counts, and the exit code that fits them.

    Raises:
        FileNotFoundError, NotADirectoryError: `images` is not there, or vanished under the run.
        FileExistsError: `out` holds something else; FingerprintMismatch: a cache made otherwise.
        ValueError, TypeError: wrong arguments; no picture, or none that can be read; pictures
            changed since they were indexed (ImagesChanged); impossible tokens (TokenError).
        TooManyBadImages: over `max_bad`; finished shards are kept.
        CacheWriteError: disk full, folder read-only and the like; finished shards are kept.
    """
    started = time.monotonic()
    if max_bad is not None:
        check_count("max_bad", max_bad, 0)
    with quiet_pillow(), _exit_on_sigterm():
        job = prepare(
            images,
            out,
            tokenizer,
            views=views,
            batch_size=batch_size,
            shard_size=shard_size,
            workers=workers,
        )
        todo = pending(job)
        encoded = sum(len(job.manifest.rows_of(number)) for number in todo)
        done = job.manifest.images - encoded
        bad = sum(
            shards.read_header(shards.shard_path(job.out, number)).bad
            for number in sorted(set(range(job.manifest.shards)) - set(todo))
        )
        with _reporting(progress, job.manifest.images, done) as report:

            def advance(new: int, new_bad: int) -> None:
                nonlocal done, bad
                done, bad = done + new, bad + new_bad
                _check_bad(job, bad, max_bad)
                report(Progress(done, bad, job.manifest.images))

            _check_bad(job, bad, max_bad)
            for number in todo:
                encode_shard(job, number, advance)
        bad = finish(job)
    seconds = time.monotonic() - started
    return Summary(job.out, job.manifest.images, bad, job.manifest.shards, encoded, seconds)


def _check_bad(job: Job, bad: int, max_bad: int | None) -> None:
    if max_bad is not None and bad > max_bad:
        raise TooManyBadImages(
            f"{job.root}: {bad} pictures could not be read, more than max_bad={max_bad}; "
            "repair them, or run again with a higher limit (finished shards are kept)"
        )


@contextmanager
def _reporting(
    progress: bool | Callable[[Progress], None], total: int, done: int
) -> Iterator[Callable[[Progress], None]]:
    if callable(progress):
        yield progress
        return
    # disable=None: tqdm's word for "off where stderr is no terminal".
    off = None if progress else True
    with tqdm(total=total, initial=done, unit="img", desc="cache", disable=off) as bar:

        def report(state: Progress) -> None:
            bar.update(state.done - bar.n)
            if state.bad:
                bar.set_postfix(bad=state.bad, refresh=False)

        yield report


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM, a scheduler's way to stop a job, unwind the stack, so temporary files go."""
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
