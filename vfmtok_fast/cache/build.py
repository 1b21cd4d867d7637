"""Building a cache: the run of one process around the functions of `vfmtok_fast.cache.job`.

Processes share the work without talking to each other: each does its own shards, then whatever is
missing still. Work may be done twice when one is slow or dies; nothing is done wrong, because a
shard is the same bytes whoever writes it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from ..images import quiet_pillow
from . import shards
from .encode import Waits
from .job import Job, encode_shards, finish, is_missing, pending
from .manifest import Tokenizer
from .prepare import check_count, prepare

# Seconds in which another process may finish a shard, where this one has not made any to compare;
# and the least.
SLOW_SHARD = 40.0
LEAST_PATIENCE = 1.0


class TooManyBadImages(RuntimeError):
    """More pictures than `max_bad` had to be quarantined."""

    exit_code = 4


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        done: pictures in the cache, those of other processes as of the last shard.
        bad: bad ones among them.
        total: pictures in all.
        rate: pictures per second that this process encodes, since it started to.
        data_wait: share of that time, 0 to 1, that it waited for pictures to be decoded.
        device_wait: share that it waited for the tokenizer.
    """

    done: int
    bad: int
    total: int
    rate: float = field(default=0.0, compare=False)
    data_wait: float = field(default=0.0, compare=False)
    device_wait: float = field(default=0.0, compare=False)

    @property
    def eta(self) -> float | None:
        """Seconds to go at this process's rate; None before there is one."""
        return (self.total - self.done) / self.rate if self.rate else None


@dataclass(frozen=True)
class Summary:
    """What `build` did.

    Args:
        out: the cache.
        images: pictures in the cache, bad ones included.
        bad: quarantined pictures; of the finished shards, where not all are.
        shards: shards in the cache.
        encoded: pictures encoded by this run; 0 if the cache was complete already.
        seconds: how long this run took.
        missing: shards that are still to come; 0 for a complete cache.
    """

    out: Path
    images: int
    bad: int
    shards: int
    encoded: int
    seconds: float
    missing: int = 0

    @property
    def exit_code(self) -> int:
        """0: done; 3: done, with quarantined pictures."""
        return 3 if self.bad else 0


def build(
    images: str | os.PathLike,
    out: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    input_kind: str | None = None,
    views: Iterable[str] = ("center",),
    seed: int = 0,
    batch_size: int = 16,
    shard_size: int = 8192,
    max_bad: int | None = None,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    shard_range: tuple[int, int | None] | None = None,
    progress: bool | Callable[[Progress], None] = False,
) -> Summary:
    """Encode every picture of an input into a token cache, or go on with one that was interrupted.

    May be killed at any moment; the next call with the same arguments goes on where it stopped, and
    the result is the same bytes. SIGTERM is turned into SystemExit(143) for the time of the call,
    where the program has not set a handler of its own.

    Args:
        images: folder of class folders of pictures, or an archive of another kind (see
            `vfmtok_fast.cache.sources.open_source`).
        out: the cache; a new or empty folder, or a cache made with the same settings.
        tokenizer: see `vfmtok_fast.cache.manifest.Tokenizer`.
        input_kind: what `images` is, where that is not plain from its name.
        views: names of views, see `vfmtok_fast.cache.views`.
        seed: of the random crops.
        batch_size: views per call of `encode`, always padded to this.
        shard_size: pictures per shard.
        max_bad: give up when more pictures than this have to be quarantined; None: never.
        workers: threads that read and decode; None: one per CPU that this process may use, at
            most 8.
        rank, world_size: which of how many processes this is; each takes its share of the shards,
            then what the others have not done. They may differ from run to run.
        shard_range: (A, B): only the shards A to B - 1, for batch systems; B None: to the end.
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
    check_count("world_size", world_size, 1)
    check_count("rank", rank, 0)
    if rank >= world_size:
        raise ValueError(f"cache: rank must be below world_size, got {rank} of {world_size}")
    with quiet_pillow(), _exit_on_sigterm():
        job = prepare(
            images,
            out,
            tokenizer,
            input_kind=input_kind,
            views=views,
            seed=seed,
            batch_size=batch_size,
            shard_size=shard_size,
            workers=workers,
            rank=rank,
        )
        numbers = _numbers(job, shard_range)
        state = _State(job, max_bad)
        with _reporting(progress, job.manifest.images, state.progress().done) as report:

            def advance(number: int, new: int, bad: int) -> None:
                state.advance(number, new, bad)
                report(state.progress())

            own, others = _shares(numbers, rank, world_size)
            encode_shards(job, state.missing(own), advance, state.waits)
            state.wait_for(others)
            encode_shards(job, state.missing(others), advance, state.waits)
            state.refresh()
            report(state.progress())
        missing = len(pending(job)) if shard_range else 0
        bad = state.progress().bad if missing else finish(job)
    seconds = time.monotonic() - started
    found = job.manifest
    return Summary(job.out, found.images, bad, found.shards, state.encoded, seconds, missing)


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


def _shares(numbers: range, rank: int, world_size: int) -> tuple[range, list[int]]:
    """A process's own shards, and those of the others in the order in which it would do them.

    From the end, because a process that is still at work does its own from the start; and each
    from another place, so that not all take the same one.
    """
    own = numbers[rank::world_size]
    others = [number for number in reversed(numbers) if number not in own]
    turn = rank * len(others) // world_size
    return own, others[turn:] + others[:turn]


class _State:
    """What is done, here and by other processes."""

    def __init__(self, job: Job, max_bad: int | None) -> None:
        self.job, self.max_bad = job, max_bad
        self.waits = Waits()
        self.encoded = 0
        self.started = time.monotonic()
        self._done = self._bad = 0
        self._seen: set[str] = set()  # shards that are there and counted
        self._here: dict[int, tuple[int, int]] = {}  # others, begun here: pictures, bad ones
        self.refresh()

    def missing(self, numbers: Iterable[int]) -> Iterator[int]:
        """Those of some shards that are missing when their turn comes."""
        for number in numbers:
            if is_missing(self.job, number):
                yield number
                self.refresh()

    def wait_for(self, numbers: Iterable[int]) -> None:
        """Let others finish shards that they may be at work on; give up on whoever is too slow."""
        shards_here = self.encoded / self.job.manifest.shard_size
        pace = (time.monotonic() - self.started) / shards_here if shards_here else SLOW_SHARD
        patience = max(1.5 * pace, LEAST_PATIENCE)
        last, seen = time.monotonic(), len(self._seen)
        while any(is_missing(self.job, number) for number in numbers):
            if time.monotonic() - last > patience:
                return
            time.sleep(min(0.2, patience / 4))
            self.refresh()
            if len(self._seen) > seen:
                last, seen = time.monotonic(), len(self._seen)

    def advance(self, number: int, new: int, bad: int) -> None:
        pictures, bad_ones = self._here.get(number, (0, 0))
        self._here[number] = pictures + new, bad_ones + bad
        self.encoded += new
        self._done, self._bad = self._done + new, self._bad + bad
        self._check_bad()

    def refresh(self) -> None:
        """Look which shards have come; the header of each is read once."""
        names = set(os.listdir(self.job.out / "shards"))
        for name in names - self._seen:
            number = shards.shard_number(name)
            if number is None or number >= self.job.manifest.shards:
                continue
            if is_missing(self.job, number):  # damaged; it comes again under the same name
                continue
            self._seen.add(name)
            here, here_bad = self._here.pop(number, (0, 0))
            self._done += len(self.job.manifest.rows_of(number)) - here
            self._bad += shards.read_header(shards.shard_path(self.job.out, number)).bad - here_bad
        self._check_bad()

    def progress(self) -> Progress:
        seconds = max(time.monotonic() - self.started, 1e-9)
        return Progress(
            done=self._done,
            bad=self._bad,
            total=self.job.manifest.images,
            rate=self.encoded / seconds,
            data_wait=self.waits.data / seconds,
            device_wait=self.waits.device / seconds,
        )

    def _check_bad(self) -> None:
        _check_bad(self.job, self._bad, self.max_bad)


def _check_bad(job: Job, bad: int, max_bad: int | None) -> None:
    if max_bad is not None and bad > max_bad:
        raise TooManyBadImages(
            f"{job.source.root}: {bad} pictures could not be read, more than max_bad={max_bad}; "
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
            waits = f"{state.data_wait:.0%} data, {state.device_wait:.0%} device"
            bar.set_postfix(bad=state.bad, waiting=waits, refresh=False)

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
