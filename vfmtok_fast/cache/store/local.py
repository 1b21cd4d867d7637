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
    """A path with the operations that a cache needs; see `Place`."""

    remote: ClassVar[bool] = False

    def size(self) -> int:
        return self.stat().st_size

    def read_range(self, start: int, end: int) -> bytes:
        with open(self, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def open_bytes(self) -> BinaryIO:
        return open(self, "rb")

    def names(self) -> list[str]:
        try:
            return os.listdir(self)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def writing(self) -> AbstractContextManager[BinaryIO]:
        return atomic.atomic_file(self)

    def put(self, data: bytes) -> None:
        with atomic.atomic_file(self) as file:
            file.write(data)

    def put_first(self, data: bytes) -> None:
        """Like `put`, but keep a file that another process has put there first."""
        with atomic.atomic_file(self, first=True) as file:
            file.write(data)

    def take_over(self, source: LocalPlace) -> None:
        with writes(self), contextlib.suppress(FileNotFoundError):  # another process has done it
            os.replace(source, self)
            atomic.sync_folder(self.parent)

    def remove(self) -> None:
        with writes(self), contextlib.suppress(FileNotFoundError):
            self.unlink()
            atomic.sync_folder(self.parent)

    def make_folder(self) -> None:
        with writes(self):
            self.mkdir(parents=True, exist_ok=True)

    def remove_folder(self) -> None:
        with contextlib.suppress(OSError):  # not empty, or not there
            self.rmdir()

    def sweep(self) -> int:
        return temporary.sweep(self)

    def spread(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        return map(function, items)
