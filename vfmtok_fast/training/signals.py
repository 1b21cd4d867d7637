"""Signals that ask a run to stop, which it does after the step at hand."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

# What a scheduler sends before it takes the machine away, a user, and a terminal that closes.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Where a scheduler signals all processes of a job, torchrun passes its own signal on to them: for
# so many seconds a second one says what the first one has said.
SAME = 5.0


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Collect signals for the time of a block; a later one does what it would have done.

    Those that were ignored, as under nohup, still are.
    """
    came: list[int] = []
    first = 0.0
    before = {}

    def note(number: int, frame: object) -> None:
        nonlocal first
        if not came:
            first = time.monotonic()
        elif time.monotonic() - first > SAME:
            signal.signal(number, before[number])
            signal.raise_signal(number)
        came.append(number)

    try:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, note)
                before[number] = handler
    except ValueError:  # not the main thread, which alone hears signals
        pass
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
