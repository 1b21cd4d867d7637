"""Track a run's progress: count what is done, here and by other processes, and report it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ...bars import bar
from ..format import shards
from .encode import Waits
from .job import Job, finished

# Seconds that another process may take for a shard, if this one has made none to compare with; and
# the shortest time it is given.
SLOW_SHARD = 40.0
LEAST_PATIENCE = 1.0


class TooManyBadImages(RuntimeError):
    """More than `max_bad` images had to be quarantined."""

    exit_code = 4


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        done: images in the cache; those of other processes as of the last shard.
        bad: bad images among them.
        total: images in all.
        rate: images per second that this process has encoded since it started.
        data_wait: share of that time, 0 to 1, that it waited for images to be decoded.
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
        """Seconds left at this process's rate; None before there is a rate."""
        return (self.total - self.done) / self.rate if self.rate else None


class State:
    """What is done, here and by other processes."""

    def __init__(self, job: Job, max_bad: int | None) -> None:
        self.job, self.max_bad = job, max_bad
        self.waits = Waits()
        self.encoded = 0
        self.started = time.monotonic()
        self._done = self._bad = 0
        self._seen: set[int] = set()  # finished shards, counted as a whole
        self._here: dict[int, tuple[int, int]] = {}  # other shards, begun here: images, bad ones
        self.refresh()

    def missing(self, numbers: Iterable[int]) -> Iterator[int]:
        """Yield those of some shards that are still missing when their turn comes."""
        for number in numbers:
            if finished(self.job, number) is None:
                yield number
                self.refresh()

    def unseen(self, numbers: Iterable[int]) -> list[int]:
        """Return those of some shards that were missing at the last look."""
        return [number for number in numbers if number not in self._seen]

    def wait_for(self, numbers: Iterable[int]) -> None:
        """Wait for shards that other processes may be making; give up if they are too slow."""
        shards_here = self.encoded / self.job.manifest.shard_size
        pace = (time.monotonic() - self.started) / shards_here if shards_here else SLOW_SHARD
        patience = max(1.5 * pace, LEAST_PATIENCE)
        last, seen = time.monotonic(), len(self._seen)
        while any(finished(self.job, number) is None for number in numbers):
            if time.monotonic() - last > patience:
                return
            time.sleep(min(0.2, patience / 4))
            self.refresh()
            if len(self._seen) > seen:
                last, seen = time.monotonic(), len(self._seen)

    def advance(self, number: int, new: int, bad: int) -> None:
        """Count images encoded here, unless another process has made their shard meanwhile."""
        self.encoded += new
        if number in self._seen:
            return
        pictures, bad_ones = self._here.get(number, (0, 0))
        self._here[number] = pictures + new, bad_ones + bad
        self._done, self._bad = self._done + new, self._bad + bad
        self._check_bad()

    def refresh(self) -> None:
        """Look for new shards; the header of each is read once."""
        there = map(shards.shard_number, (self.job.out / "shards").names())
        for number in set(there) - self._seen:
            if number is None or number >= self.job.manifest.shards:
                continue
            header = finished(self.job, number)
            if header is None:  # damaged; it will be made again under the same name
                continue
            self._seen.add(number)
            here, here_bad = self._here.pop(number, (0, 0))
            self._done += header.count - here
            self._bad += header.bad - here_bad
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
        if self.max_bad is not None and self._bad > self.max_bad:
            raise TooManyBadImages(
                f"{self.job.source.root}: {self._bad} pictures could not be read, more than "
                f"max_bad={self.max_bad}; repair them, or run again with a higher limit (finished "
                "shards are kept)"
            )


@contextmanager
def reporting(
    progress: bool | Callable[[Progress], None], total: int, done: int
) -> Iterator[Callable[[Progress], None]]:
    if callable(progress) or not progress:
        # No tqdm unless needed: forked processes share its lock, and a killed one never frees it.
        yield progress or (lambda state: None)
        return
    with bar(total, "img", "cache", done) as shown:

        def report(state: Progress) -> None:
            waits = f"{state.data_wait:.0%} data, {state.device_wait:.0%} device"
            shown.set_postfix(bad=state.bad, waiting=waits, refresh=False)
            shown.update(state.done - shown.n)

        yield report
