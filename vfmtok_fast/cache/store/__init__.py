"""Where a cache is stored: a local folder, or a URL of an object store that fsspec reaches.

A cache has the same files in both, and any tool may copy it from one to the other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, BinaryIO, ClassVar, Protocol, Self

from .errors import CacheWriteError, StoreError
from .local import LocalPlace
from .tensors import Tensors
from .url import UrlPlace, files_of

__all__ = ["CacheWriteError", "LocalPlace", "Place", "StoreError", "Tensors", "UrlPlace", "place"]


class Place(Protocol):
    """A file or folder of a cache. Methods that write raise CacheWriteError and leave no half file.

    `LocalPlace` also has what only a disk can do (is_dir, put_first, sweep, remove_folder).
    """

    # Whether it is in a store: nothing there can be mapped or renamed, and a writer that dies may
    # leave a torn file under its final name.
    remote: ClassVar[bool]
    name: str

    @property
    def parent(self) -> Self: ...

    def __truediv__(self, name: str) -> Self: ...

    def exists(self) -> bool: ...

    def read_bytes(self) -> bytes:
        """Return a file's bytes; FileNotFoundError if there is none."""

    def size(self) -> int:
        """Return a file's size in bytes; FileNotFoundError if there is none."""

    def read_range(self, start: int, end: int) -> bytes:
        """Return a range of a file's bytes; fewer if the file ends earlier."""

    def open_bytes(self) -> BinaryIO:
        """Open a file for reading; FileNotFoundError if there is none."""

    def names(self) -> list[str]:
        """Return the names in a folder; an empty list if the folder is missing."""

    def writing(self) -> AbstractContextManager[BinaryIO]:
        """Open a file for writing that takes its name only if the block ends without an error."""

    def put(self, data: bytes) -> None:
        """Write a file, whole or not at all."""

    def take_over(self, source: Self) -> None:
        """Move ``source`` here; do nothing if it is gone. May be repeated."""

    def remove(self) -> None:
        """Remove a file if it exists, durably (also after a power cut)."""

    def make_folder(self) -> None:
        """Create a folder and its parents if they are missing; a store has no folders."""

    def spread(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """`map`, in order; for a store, with many requests at once."""


def place(out: str | os.PathLike | Place) -> Place:
    """Return a local path or, for a URL (s3://, gs://, memory://, ...), a path in a store.

    A local path is made absolute: a program may change its working directory, as Hydra does.

    Raises:
        ValueError: the protocol is unknown, or the package that reads it is not installed.
    """
    if isinstance(out, UrlPlace | LocalPlace):
        return out
    protocol, mark, rest = os.fspath(out).partition("://")
    if not mark:
        if re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", os.fspath(out)):  # what Path makes of s3://
            raise ValueError(
                f"{out}: give a URL as a string; pathlib.Path removes one of its slashes"
            )
        if not os.fspath(out):
            raise ValueError("an empty path: name a folder, or . for the current one")
        return LocalPlace(os.path.expanduser(out)).absolute()
    if protocol in ("file", "local"):
        return LocalPlace("/" + rest.lstrip("/"))
    url = os.fspath(out).rstrip("/")
    files_of(url)
    return UrlPlace(url)
