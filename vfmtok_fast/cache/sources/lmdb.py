"""The LMDB of the authors' training code, read only.

    num_samples -> n        "0" ... "n-1" -> pickled {"image": bytes, "label": int}

A pickle is a program, so loading one from elsewhere means running its author's code. These pickles
are therefore not loaded: `plain_pickle` follows the few instructions that build dicts, strings,
bytes and integers and refuses any other. An image in the database is never copied to look at its
label.
"""

from __future__ import annotations

import functools
import pickletools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import one_line
from ..format.shards import BAD, GONE
from .base import DAMAGED, NO_CLASS, BadImage, Entry, Source, labelled, sizes_of

_VALUES = frozenset(
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BININT BININT1"
    " BININT2 LONG1".split()
)
# Values up to this many bytes are copied: pickletools needs real bytes there. Longer ones are not.
_SMALL = 4096
# A record holds one image: a dict, two keys, two values. More instructions are something else.
_MAX_STEPS = 1000


class NotPlain(ValueError):
    """A pickle that is damaged, or holds anything but dicts, strings, bytes and integers."""


class LmdbSource(Source):
    """Records of the LMDB `root`: the folder that holds data.mdb, or the file itself."""

    kind = "lmdb"

    def files(self) -> dict[str, int]:
        if self.root.is_dir():
            return sizes_of(self.root, ["data.mdb"])
        return sizes_of(self.root.parent, [self.root.name])

    def entries(self, after: Entry | None = None) -> Iterator[Entry]:
        first = 0 if after is None else after.offset + 1
        count = self._count()
        with self._open().begin(buffers=True) as records:
            for number in range(first, count):
                size, label = _look(records.get(str(number).encode()))
                yield Entry(f"{number:08d}", size, label, next(iter(self.files())), number)

    def find(self, entry: Entry) -> bytes:
        with self._open().begin(buffers=True) as records:
            record = records.get(str(entry.offset).encode())
            if record is None:
                raise BadImage(GONE, "gone since it was indexed")
            try:
                return bytes(plain_pickle(record)["image"])
            except (NotPlain, TypeError, KeyError) as error:
                raise BadImage(BAD, f"its record is damaged: {error}") from error

    def _count(self) -> int:
        with self._open().begin() as records:
            value = records.get(b"num_samples")
        if value is None:
            raise ValueError(f"{self.root}: has no key num_samples; not the authors' LMDB")
        try:
            count = int(value) if value.isdigit() else plain_pickle(value)
        except NotPlain as error:
            raise ValueError(f"{self.root}: num_samples cannot be read: {error}") from error
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{self.root}: num_samples must be a number, got {count!r:.40}")
        return count

    def _open(self) -> Any:
        with _OPENING:
            return _environment(self.root.resolve(), self.root.stat().st_ino)


_OPENING = threading.Lock()


@functools.lru_cache(maxsize=16)
def _environment(root: Path, inode: int) -> Any:
    """Open a database; the library allows each only once per process, so it stays open."""
    try:
        import lmdb
    except ImportError as error:
        raise ValueError(
            f"{root}: reading an LMDB needs the package lmdb: pip install 'vfmtok-fast[lmdb]'"
        ) from error
    try:
        found = lmdb.open(str(root), subdir=root.is_dir(), readonly=True, lock=False, create=False)
    except lmdb.Error as error:
        raise ValueError(f"{root}: cannot be read as LMDB: {error}") from error
    # It is memory-mapped: reading beyond the end of a file that was cut short ends the process.
    size = (root / "data.mdb" if root.is_dir() else root).stat().st_size
    needed = (found.info()["last_pgno"] + 1) * found.stat()["psize"]
    if size < needed:
        found.close()
        raise ValueError(f"{root}: was cut short, to {size} of {needed} bytes; copy it again")
    return found


def _look(record: memoryview | None) -> tuple[int, int]:
    """Return (size in bytes or why there is none, label) of a record."""
    try:
        content = plain_pickle(record)
        return labelled(len(memoryview(content["image"])), content["label"])
    except (NotPlain, TypeError, KeyError):
        return DAMAGED, NO_CLASS


def plain_pickle(data: bytes | memoryview) -> Any:
    """Return what a pickle of dicts, strings, bytes and integers holds; imports and calls nothing.

    Args:
        data: a pickle of protocol 3 or newer (older ones have no bytes).

    Returns:
        The value; long bytes are memoryviews into `data`.

    Raises:
        NotPlain: it holds anything else, is damaged or cut short.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    try:
        for step, (code, value, _) in enumerate(pickletools.genops(_Reader(data))):
            name = code.name
            if step > _MAX_STEPS:
                raise NotPlain("holds more than one picture")
            if name in _VALUES:
                stack.append(value)
            elif name == "EMPTY_DICT":
                stack.append({})
            elif name == "MARK":
                marks.append(len(stack))
            elif name in ("SETITEM", "SETITEMS"):
                start = marks.pop() if name == "SETITEMS" else len(stack) - 2
                items = stack[start:]
                del stack[start:]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            elif name == "MEMOIZE" or (name == "BINPUT" and value == len(memo)):
                memo.append(stack[-1])
            elif name == "BINGET":
                stack.append(memo[value])
            elif name == "STOP":
                (result,) = stack
                return result
            elif name not in ("PROTO", "FRAME"):
                raise NotPlain(f"its pickle holds the instruction {name}, which is not allowed")
    except NotPlain:
        raise
    except (ValueError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise NotPlain(f"damaged pickle ({one_line(error):.80})") from error
    raise NotPlain("its pickle is cut short")


class _Reader:
    """A buffer as the file that pickletools reads; long parts are not copied."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self._at = memoryview(data), 0

    def read(self, size: int) -> bytes | memoryview:
        part = self._data[self._at : self._at + size]
        self._at += len(part)
        return bytes(part) if len(part) <= _SMALL else part

    def tell(self) -> int:
        return self._at
