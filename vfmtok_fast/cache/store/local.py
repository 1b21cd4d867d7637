"""A cache on a local disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from ... import temporary
from . import atomic
from .errors import writes


class LocalPlace(type(Path())):
    """A path with the operations that a cache needs.

    `UrlPlace` has the same ones, except those that only a disk can do (put_first, sweep,
    remove_folder). Methods that write raise CacheWriteError and leave no half file.
    """

    # Whether it is in a store: nothing there can be mapped or renamed, and a writer that dies may
    # leave a torn file under its final name.
    remote: ClassVar[bool] = False

    def size(self) -> int:
        """Return a file's size in bytes; FileNotFoundError if there is none."""
        return self.stat().st_size

    def read_range(self, start: int, end: int) -> bytes:
        """Return a range of a file's bytes; fewer if the file ends earlier."""
        with open(self, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def open_bytes(self) -> BinaryIO:
        """Open a file for reading; FileNotFoundError if there is none."""
        return open(self, "rb")

    def names(self) -> list[str]:
        """Return the names in a folder; an empty list if the folder is missing."""
        try:
            return os.listdir(self)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def writing(self) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing that takes its name only if the block ends without an error."""
        return atomic.atomic_file(self)

    def put(self, data: bytes) -> None:
        """Write a file, whole or not at all."""
        with atomic.atomic_file(self) as file:
            file.write(data)

    def put_first(self, data: bytes) -> None:
        """Like `put`, but keep a file that another process has put there first."""
        with atomic.atomic_file(self, first=True) as file:
            file.write(data)

    def take_over(self, source: LocalPlace) -> None:
        """Move ``source`` here; do nothing if it is gone. May be repeated."""
        with writes(self), contextlib.suppress(FileNotFoundError):  # another process has done it
            os.replace(source, self)
            atomic.sync_folder(self.parent)

    def remove(self) -> None:
        """Remove a file if it exists, durably (also after a power cut)."""
        with writes(self), contextlib.suppress(FileNotFoundError):
            self.unlink()
            atomic.sync_folder(self.parent)

    def make_folder(self) -> None:
        """Create a folder and its parents if they are missing; a store has no folders."""
        with writes(self):
            self.mkdir(parents=True, exist_ok=True)

    def remove_folder(self) -> None:
        """Remove a folder if it is there and empty."""
        with contextlib.suppress(OSError):
            self.rmdir()

    def sweep(self) -> int:
        return temporary.sweep(self)

    def spread(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """`map`, in order; for a store, with many requests at once."""
        return map(function, items)
