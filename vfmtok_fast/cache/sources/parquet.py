"""Parquet files with the pictures' bytes in them, as the Hugging Face hub keeps image data sets.

    image: struct<bytes: binary, path: string>  (or plain binary)      label: integer

Files are taken in the order of their names; which columns, `columns` finds out. To index, only the
labels are read, so the size of a picture is not known before it is read; what changed is seen by
the sizes of the files.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import one_line
from ..format.shards import BAD, GONE
from .base import (
    BAD_LABEL,
    NO_CLASS,
    UNKNOWN,
    BadImage,
    Entry,
    Source,
    behind,
    check_label,
    files_from,
    sizes_of,
)
from .choice import EVERYTHING, Choice
from .columns import Columns, leaf_of

# Rows that are read together, and how many are kept: decoding threads ask for rows in nearly
# ascending order. 128 photos are some 15 MB.
_BATCH = 16
_KEPT = 128
# Rows of a block at most, where row groups are larger.
_MOST = 1000

# Read in pieces, not mapped: a file that shrinks under its reader would end the process.
_READ = {"memory_map": False, "buffer_size": 1 << 20, "pre_buffer": False}


@dataclass
class ParquetSource(Source):
    """Rows of the Parquet files `names` in the folder `root`."""

    root: Path
    names: tuple[str, ...]
    columns: Columns
    choice: Choice = EVERYTHING
    kind = "parquet"
    left_out = MappingProxyType({})
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _rows: OrderedDict[tuple[str, int], bytes | None] = field(
        default_factory=OrderedDict, repr=False
    )
    # The walk through one file: its name, the row that comes next, the batches to come.
    _walk: tuple[str, int, Iterator[pa.RecordBatch]] | None = field(default=None, repr=False)
    _block: int = field(default=1, repr=False)
    _kept: int = field(default=_KEPT, repr=False)

    def __reduce__(self) -> tuple:
        # Locks and open files do not travel.
        return type(self), (self.root, self.names, self.columns, self.choice)

    @property
    def chosen(self) -> dict[str, Any]:
        """What of the files is taken, where that is not plain."""
        return {**self.choice.record(), **self.columns.record()}

    def files(self) -> dict[str, int]:
        return sizes_of(self.root, list(self.names))

    def entries(self, after: Entry | None = None) -> Iterator[Entry]:
        return behind(self._entries(files_from(self.names, after)), after)

    def _entries(self, names: Sequence[str]) -> Iterator[Entry]:
        for name in names:
            path = self.root / name
            with _opened(path) as file:
                if file.metadata.num_rows == 0:
                    continue
                self.columns.check(file.schema_arrow, path)
                for row, label in enumerate(self._labels(file, name)):
                    known = NO_CLASS if label is None else check_label(label)
                    size = UNKNOWN if known is not None else BAD_LABEL
                    label = NO_CLASS if known is None else known
                    yield Entry(f"{name}/{row:08d}", size, label, name, row)

    def _labels(self, file: pq.ParquetFile, name: str) -> Iterator[int | None]:
        if self.columns.label is None or self.columns.values is not None:
            label = self.columns.label_of(name) if self.columns.label else None
            yield from itertools.repeat(label, file.metadata.num_rows)
            return
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=[self.columns.label])
            yield from table.column(0).to_pylist()

    def classes(self, highest: int) -> list[str]:
        """The names that Hugging Face's `datasets` writes beside a ClassLabel, or numbers."""
        names = self.columns.class_names()
        return list(names) if len(names) > highest else super().classes(highest)

    def find(self, entry: Entry) -> bytes:
        place = entry.file, entry.offset
        with self._lock:
            if place not in self._rows:
                self._load(*place)
            if place not in self._rows:
                raise BadImage(GONE, "gone since it was indexed")
            data = self._rows[place]
        if data is None:
            raise BadImage(BAD, "holds no bytes of a picture")
        return data

    def read_blocks(self, kept: int) -> int:
        """Read rows with all of their block from now on: for who jumps among a few blocks.

        Args:
            kept: rows that stay in memory.

        Returns:
            Rows of a block: those of a row group.
        """
        with _opened(self.root / self.names[0]) as file:
            rows = file.metadata.row_group(0).num_rows if file.num_row_groups else 1
        self._block, self._kept = max(1, min(rows, _MOST)), max(kept, _KEPT)
        return self._block

    def _load(self, name: str, row: int) -> None:
        """Walk on to a row, or start anew where the walk is past it or far before it."""
        path, last = self.root / name, (row // self._block + 1) * self._block - 1
        try:
            file, next_row, _ = self._walk or ("", 0, None)
            if file != name or not next_row <= row < next_row + _KEPT:
                self._walk = (name, *_walk_from(path, row, self.columns.image))
            _, at, batches = self._walk
            for batch in batches:
                for value in _bytes_of(batch.column(0)):
                    self._rows[name, at] = value
                    at += 1
                while len(self._rows) > self._kept:
                    self._rows.popitem(last=False)
                self._walk = (name, at, batches)
                if at > last:
                    return
        except (OSError, pa.ArrowInvalid) as error:
            self._walk = None
            raise OSError(f"{path}: cannot be read any more: {one_line(error)}") from error
        self._walk = None


def _walk_from(path: Path, row: int, column: str) -> tuple[int, Iterator[pa.RecordBatch]]:
    """The row group that a row lies in: its first row, and batches from there to the file's end."""
    file = pq.ParquetFile(path, **_READ)
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < first + count:
            leaf = leaf_of(file.schema_arrow, column) or column
            return first, _batches(file, group, leaf)
        first += count
    file.close()
    return first, iter(())


def _batches(file: pq.ParquetFile, first: int, column: str) -> Iterator[pa.RecordBatch]:
    groups = range(first, file.num_row_groups)
    with file:
        # One thread: the decoding of pictures is what the cores are for.
        yield from file.iter_batches(_BATCH, groups, columns=[column], use_threads=False)


def _bytes_of(column: pa.Array) -> list[bytes | None]:
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return column.to_pylist()


def schemas(root: Path, names: Sequence[str]) -> Iterator[tuple[pa.Schema, bool]]:
    """The schema of each file in turn, and whether it has rows."""
    for name in names:
        with _opened(root / name) as file:
            yield file.schema_arrow, file.metadata.num_rows > 0


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, **_READ) as file:
            yield file
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: cannot be read as Parquet: {one_line(error)}") from error
