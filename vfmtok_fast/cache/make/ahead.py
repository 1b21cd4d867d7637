"""Run work in threads ahead of its consumer: in order, for a bounded number of items."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from ..sources import BadImage, Entry, Source


def ahead(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int, window: int, name: str
) -> Iterator[Any]:
    """`map` in threads called `name`, in order, with at most `window` items not yet handed out."""
    items, waiting = iter(items), deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix=name)
    try:
        while True:
            coming = islice(items, window - len(waiting))
            waiting.extend(pool.submit(function, item) for item in coming)
            if not waiting:
                return
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def hashed_entries(source: Source, entries: Iterable[Entry], workers: int) -> Iterator[Entry]:
    """Yield entries in order with the SHA-256 of each image's bytes; bad images get none."""

    def hashed(entry: Entry) -> Entry:
        try:
            return entry._replace(sha256=hashlib.sha256(source.read(entry)).digest())
        except BadImage:
            return entry

    return ahead(hashed, entries, workers, 4 * workers, "vfmtok-hash")
