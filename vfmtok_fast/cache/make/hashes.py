"""Hashes of pictures for the index: a change that keeps the size is noticed when it is read."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from ..sources import BadImage, Entry, Source


def hashed_entries(source: Source, entries: Iterable[Entry], workers: int) -> Iterator[Entry]:
    """Entries with the SHA-256 of each picture's bytes, in the same order; none for bad ones.

    They are taken a few ahead of what was handed out, and read by `workers` threads.
    """

    def hashed(entry: Entry) -> Entry:
        try:
            return entry._replace(sha256=hashlib.sha256(source.read(entry)).digest())
        except BadImage:
            return entry

    entries = iter(entries)
    with ThreadPoolExecutor(workers, thread_name_prefix="vfmtok-hash") as pool:
        waiting = deque(pool.submit(hashed, entry) for entry in islice(entries, 4 * workers))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(hashed, entry) for entry in islice(entries, 1))
