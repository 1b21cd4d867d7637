"""Time spent in each stage of a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class Clock:
    """Measures the seconds in each stage of the steps since the last `read`.

    On a GPU a stage's time is that of its kernels, measured with CUDA events. Only `read` waits for
    these events.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds: dict[str, float] = {}
        self._begin = time.perf_counter()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begin = self.mark()
        try:
            yield
        finally:
            self.add(name, begin)

    def mark(self) -> float | torch.cuda.Event:
        """Return the current time, to be passed to `add`."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def add(self, name: str, begin: float | torch.cuda.Event) -> None:
        """Add the time since ``begin`` to a stage."""
        end = self.mark()
        if isinstance(begin, float):
            self._seconds[name] = self._seconds.get(name, 0.0) + end - begin
        else:
            self._marks.append((name, begin, end))

    def read(self) -> tuple[float, dict[str, float]]:
        """Return the seconds since the last call and each stage's share of them."""
        for name, begin, end in self._marks:
            end.synchronize()
            seconds = begin.elapsed_time(end) / 1e3
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        now = time.perf_counter()
        total, self._begin = now - self._begin, now
        shares = {name: seconds / total for name, seconds in self._seconds.items()}
        self._marks, self._seconds = [], {}
        return total, shares
