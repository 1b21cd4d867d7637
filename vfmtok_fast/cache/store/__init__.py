"""Where a cache lies: a local folder, or a URL of an object store that fsspec reaches.

A cache has the same files in both, and may be copied from one to the other with any tool.
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
    """A file or folder of a cache. What writes raises CacheWriteError, and leaves no half file.

    What only a disk has (is_dir, put_first, sweep, remove_folder), a `LocalPlace` has besides.
    """

    # Whether it is in a store: nothing is there to be mapped or renamed, and what a writer leaves
    # that dies may be a torn file under its own name.
    remote: ClassVar[bool]
    name: str

    @property
    def parent(self) -> Self: ...

    def __truediv__(self, name: str) -> Self: ...

    def exists(self) -> bool: ...

    def read_bytes(self) -> bytes:
        """A file's bytes; FileNotFoundError where there is none."""

    def size(self) -> int:
        """Bytes of a file; FileNotFoundError where there is none."""

    def read_range(self, start: int, end: int) -> bytes:
        """Some of a file's bytes, fewer where it ends before."""

    def open_bytes(self) -> BinaryIO:
        """Open for reading; FileNotFoundError where there is none."""

    def names(self) -> list[str]:
        """Names of what lies in a folder; none where it is missing."""

    def writing(self) -> AbstractContextManager[BinaryIO]:
        """A file to write that takes its name only when the block ends well."""

    def put(self, data: bytes) -> None:
        """Write a file whole or not at all."""

    def take_over(self, source: Self) -> None:
        """Become what ``source`` is, which goes; nothing if it has gone. May be done again."""

    def remove(self) -> None:
        """Remove a file if it is there, for good (also after a power cut)."""

    def make_folder(self) -> None:
        """Create a folder and its parents if they are missing; a store has no folders."""

    def spread(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """`map`, in order; of a store with many requests under way."""


def place(out: str | os.PathLike | Place) -> Place:
    """A local path, or for a URL with a protocol (s3://, gs://, memory://, ...) one in a store.

    A local path is made absolute: a program may change its folder, as Hydra does.

    Raises:
        ValueError: the protocol is unknown, or what reads it is not installed.
    """
    if isinstance(out, UrlPlace | LocalPlace):
        return out
    protocol, mark, rest = os.fspath(out).partition("://")
    if not mark:
        if re.match(r"[a-z][a-z0-9+.-]+:/(?!/)", os.fspath(out)):  # what Path makes of s3://
            raise ValueError(
                f"{out}: give a URL as a string; pathlib.Path takes one of its slashes"
            )
        if not os.fspath(out):
            raise ValueError("an empty path: name a folder, or . for the current one")
        return LocalPlace(os.path.expanduser(out)).absolute()
    if protocol in ("file", "local"):
        return LocalPlace("/" + rest.lstrip("/"))
    url = os.fspath(out).rstrip("/")
    files_of(url)
    return UrlPlace(url)
