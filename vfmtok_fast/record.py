"""Count which implementations op calls used and why, and warn of each fallback once."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Iterator

# Suffix of an implementation's name for a call that torch.compile traced.
COMPILED = " (compiled)"


class FallbackWarning(UserWarning):
    """An enabled op used its reference or a slower implementation; the text says why."""


class Record:
    """Counts of op calls, by op and by implementation or reason. Any thread may add to them.

    ``calls``: by (op, implementation). ``fallbacks``: by (op, reason). ``slower``: calls that used
    the reference because it is the fastest, by (op, reason). ``replays``: of CUDA graphs, by name.
    """

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.fallbacks: Counter[tuple[str, str]] = Counter()
        self.slower: Counter[tuple[str, str]] = Counter()
        self.replays: Counter[str] = Counter()
        self._warned: set[tuple[str, str]] = set()
        self._lock = threading.RLock()

    def call(
        self, op: str, implementation: str, reasons: tuple[str, ...], slower: str | None
    ) -> None:
        """Count one call. Only for `Op.__call__`: a warning points at the public op's caller."""
        with self._lock:
            self.calls[op, implementation] += 1
            if slower is not None:
                self.slower[op, slower] += 1
            if not reasons:
                return
            first = [reason for reason in reasons if (op, reason) not in self._warned]
            self._warned.update((op, reason) for reason in reasons)
            self.fallbacks.update((op, reason) for reason in reasons)
        for reason in first:
            # The stack level skips this method, Op.__call__ and the public op.
            warnings.warn(
                f"{op} fell back to {implementation}: {reason}", FallbackWarning, stacklevel=4
            )

    def replay(self, what: str) -> None:
        """Count one replay of a CUDA graph, which calls no op."""
        with self._lock:
            self.replays[what] += 1

    def copy(self) -> Record:
        """Return a copy of the current counts."""
        now = Record()
        with self._lock:
            for theirs, ours in zip(now._counts(), self._counts(), strict=True):
                theirs.update(ours)
        return now

    def of(self, op: str) -> Iterator[dict[str, int]]:
        """Yield the calls, fallbacks and slower calls of one op."""
        for counts in (self.calls, self.fallbacks, self.slower):
            yield {what: n for (name, what), n in counts.items() if name == op}

    def clear(self) -> None:
        """Forget everything, so that each fallback warns again."""
        with self._lock:
            self._clear()
            self._warned.clear()

    def begin_anew(self) -> None:
        """Reset the counts, so that earlier calls are not attributed to what is enabled now."""
        with self._lock:
            # A trace is counted once, when it is made, and may be called again later.
            traced = {key: n for key, n in self.calls.items() if key[1].endswith(COMPILED)}
            self._clear()
            self.calls.update(traced)

    def _counts(self) -> tuple[Counter, ...]:
        return self.calls, self.fallbacks, self.slower, self.replays

    def _clear(self) -> None:
        for counts in self._counts():
            counts.clear()
