"""Parquet files that contain the images' bytes, as on the Hugging Face hub.

    image: struct<bytes: binary, path: string>  (or plain binary)      label: integer

Files are taken in the order of their names; `columns` finds the columns. Indexing reads only the
labels, so the size of an image is not known before it is read; changes are noticed by the sizes of
the files.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import one_line
from ..format.shards import BAD, GONE
from .base import (
    NO_CLASS,
    UNKNOWN,
    BadImage,
    Entry,
    Source,
    behind,
    files_from,
    labelled,
    sizes_of,
)
from .columns import Columns, leaf_of

# Rows that are read together, and rows that are kept: decoding threads ask for rows in nearly
# ascending order. 128 photos are some 15 MB.
_BATCH = 16
_KEPT = 128
# Most rows in a block, if row groups are larger.
_MOST = 1000

# Read in pieces, not memory-mapped: a mapped file that shrinks while read ends the process.
_READ = {"memory_map": False, "buffer_size": 1 << 20, "pre_buffer": False}


@dataclass
class ParquetSource(Source):
    """Rows of the Parquet files `names` in the folder `root`."""

    names: tuple[str, ...]
    columns: Columns
    kind = "parquet"

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: OrderedDict[tuple[str, int], bytes | None] = OrderedDict()
        # The position in the file being read: its name, the next row, the remaining batches.
        self._walk: tuple[str, int, Iterator[pa.RecordBatch]] | None = None
        self._block, self._kept = 1, _KEPT

    def __reduce__(self) -> tuple:
        # Locks and open files cannot be pickled.
        return partial(type(self), choice=self.choice), (self.root, self.names, self.columns)

    @property
    def chosen(self) -> dict[str, Any]:
        """What was taken from the files, as far as it is not the default."""
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
                    size, label = labelled(UNKNOWN, NO_CLASS if label is None else label)
                    yield Entry(f"{name}/{row:08d}", size, label, name, row)

    def _labels(self, file: pq.ParquetFile, name: str) -> Iterator[int | None]:
        if self.columns.label is None or self.columns.values is not None:
            yield from itertools.repeat(self.columns.label_of(name), file.metadata.num_rows)
            return
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=[self.columns.label])
            yield from table.column(0).to_pylist()

    def classes(self, highest: int) -> list[str]:
        """Return the names of a ClassLabel or of folders such as label=cat, or numbers."""
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
        """From now on, read whole blocks of rows, for access that jumps among a few blocks.

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
        """Read on to a row, or start again if the position is past it or far before it."""
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
    """Return the first row of the row group that holds a row, and batches from there to the end."""
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
        # One thread: the cores are needed to decode images.
        yield from file.iter_batches(_BATCH, groups, columns=[column], use_threads=False)


def _bytes_of(column: pa.Array) -> list[bytes | None]:
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return column.to_pylist()


def schemas(root: Path, names: Sequence[str]) -> Iterator[tuple[pa.Schema, bool]]:
    """Yield the schema of each file, and whether it has rows."""
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
