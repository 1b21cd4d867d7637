"""Signals that ask a run to stop after the step at hand."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator

# Signals from a scheduler that will take the machine away, a user, or a closing terminal.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# If a scheduler signals all processes of a job, torchrun also forwards its own signal to them. For
# this many seconds a second signal counts as a repetition of the first.
SAME = 5.0


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Collect signals within a ``with`` block; after `SAME` seconds another has its usual effect.

    Signals that were ignored before, as under nohup, stay ignored.
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
    except ValueError:  # not the main thread, the only one that receives signals
        pass
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
