"""Progress of a command: a bar in a terminal, one line per minute in a log."""

from __future__ import annotations

import io
import sys

from tqdm import tqdm

# Seconds between lines if stderr is not a terminal; a shorter command prints none.
INTERVAL = 60
LINE = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def bar(
    total: int | None, unit: str, desc: str | None = None, done: int = 0, hidden: bool = False
) -> tqdm:
    """Return a started bar on stderr at position ``done``; the caller must close it."""
    hidden = hidden or sys.stderr is None or sys.stderr.closed
    kind = tqdm if hidden or sys.stderr.isatty() else _Lines
    return kind(total=total, initial=done, unit=unit, desc=desc, disable=hidden)


class _Lines(tqdm):
    """Plain lines, for the logs of batch jobs."""

    def __init__(self, **options):
        super().__init__(
            **options,
            delay=INTERVAL,
            mininterval=INTERVAL,
            miniters=0,
            bar_format=LINE,
            leave=False,
        )

    @staticmethod
    def status_printer(file):
        def write(text: str) -> None:
            if text:
                print(text, file=file, flush=True)

        return write

    def close(self) -> None:
        if self.disable:
            return
        if self._time() >= self.start_t + self.delay:
            self.refresh()
        # tqdm erases a bar with characters that would appear in a log.
        self.fp = io.StringIO()
        super().close()
