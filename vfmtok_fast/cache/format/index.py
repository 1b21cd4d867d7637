"""The index: which images a cache holds, in which order, with which labels.

Every kind of input (`vfmtok_fast.cache.sources`) uses the same format. If images are stored inside
larger files, two more columns, `file` and `offset`, say where, and the index also lists those files
with their sizes, so that a change is noticed. On request, a further column `sha256` holds the hash
of each image's bytes, which is compared when the image is read.

This module never holds more than one shard's rows, so indexing a million images takes little
memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import one_line
from ..store import Place, StoreError
from .entries import NO_CLASS, ORIGIN, Entry, Origin, Rows

INDEX = "index.parquet"
# Entries that an iterator over a part of an index makes at a time.
_FEW = 256
_MARK = {b"vfmtok_fast": b"token cache index 1"}
_COLUMNS = [
    ("index", pa.int64()),
    ("path", pa.string()),
    ("size", pa.int64()),
    ("label", pa.int32()),
]
_PLACE = [("file", pa.string()), ("offset", pa.int64())]
_HASH = [("sha256", pa.binary())]


def write_index(
    path: Place, entries: Iterable[Entry], shard_size: int, origin: Origin | None = None
) -> tuple[int, str, int]:
    """Write index.parquet with one row group per shard, holding only one of them in memory.

    Args:
        path: the file to write.
        entries: the images in index order.
        shard_size: images per shard.
        origin: where the images come from; None: class folders.

    Returns:
        (number of images, checksum of the index's content, highest label).

    Raises:
        CacheWriteError: the file cannot be written.
        OSError: `entries` raised it.
    """
    origin = origin or Origin()
    columns = _COLUMNS + _PLACE * (origin.files is not None) + _HASH * origin.hashed
    fields = [pa.field(name, kind, nullable=False) for name, kind in columns]
    schema = pa.schema(fields, metadata={**_MARK, **origin.metadata()})
    entries = _listed(entries)
    digest = _new_digest(origin.metadata())
    count, highest = 0, -1
    try:
        with path.writing() as file, pq.ParquetWriter(file, schema) as writer:
            while chunk := list(islice(entries, shard_size)):
                columns = dict(zip(Entry._fields, zip(*chunk, strict=True), strict=True))
                columns["index"] = range(count, count + len(chunk))
                rows = [list(columns[name]) for name in schema.names]
                writer.write_table(pa.table(rows, schema=schema), row_group_size=shard_size)
                _digest(digest, chunk, schema)
                count += len(chunk)
                highest = max(highest, *columns["label"])
    except _NotListed as error:
        raise error.__cause__ from None
    return count, digest.hexdigest(), highest


class _NotListed(Exception):
    """The input, and not the index, could not be read."""


def _listed(entries: Iterable[Entry]) -> Iterator[Entry]:
    try:
        yield from entries
    except OSError as error:
        raise _NotListed from error


@dataclass(frozen=True)
class OpenIndex:
    """An index held open, for those who read many shards: its footer, which lists all, takes long.

    Its methods raise ValueError if the file is damaged or has no such shard.
    """

    path: Place
    file: pq.ParquetFile

    def table(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """Read some columns of one shard; None: all."""
        if not 0 <= shard < self.file.num_row_groups:
            raise ValueError(
                f"{self.path}: has {self.file.num_row_groups} shards, no shard {shard}"
            )
        with _readable(self.path):
            return self.file.read_row_group(shard, columns)

    def rows(self, shard: int) -> Rows:
        """Read the rows of one shard."""
        return _rows(self.table(shard))

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Read some columns of all shards, one shard at a time."""
        return (self.table(shard, columns) for shard in range(self.file.num_row_groups))

    def entries(self, start: int, end: int | None) -> Iterator[Entry]:
        """Yield the images of rows `start` to `end` - 1; None: to the last one.

        Many such iterators may be open at a time: each holds one shard in Arrow's compact form, and
        a few entries.
        """
        about = self.file.metadata
        size = about.row_group(0).num_rows if about.num_row_groups else 1  # the last may be smaller
        end = about.num_rows if end is None else end
        for shard in range(start // size, -(-end // size)):
            first = shard * size
            for few in self.table(shard)[max(start - first, 0) : end - first].to_batches(_FEW):
                yield from _entries(few)

    @property
    def origin(self) -> Origin:
        """What was indexed."""
        schema = self.file.schema_arrow
        content = json.loads(schema.metadata.get(ORIGIN, b"{}"))
        runs = tuple(content.get("runs", ()))
        return Origin(**{**content, "runs": runs}, hashed="sha256" in schema.names)


@contextlib.contextmanager
def opened(path: Place) -> Iterator[OpenIndex]:
    """Open an index; ValueError if the file is missing or damaged."""
    with contextlib.ExitStack() as stack:
        with _readable(path):
            file = pq.ParquetFile(stack.enter_context(_source(path)))
            if (file.schema_arrow.metadata or {}).get(b"vfmtok_fast") != _MARK[b"vfmtok_fast"]:
                raise ValueError(f"{path}: not an index of a token cache")
        yield OpenIndex(path, file)


def is_index(path: Place) -> bool:
    """Return whether a file is an index that this module wrote."""
    try:
        with opened(path):
            return True
    except ValueError:
        return False


def read_rows(path: Place, shard: int) -> Rows:
    """Read the rows of one shard; for many shards, `opened` is faster.

    Raises:
        ValueError: the file is missing or damaged, or has no such shard.
    """
    with opened(path) as found:
        return found.rows(shard)


def read_all(path: Place) -> Iterator[Rows]:
    """Read the rows of all shards, one shard at a time; raises like `read_rows`."""
    with opened(path) as found:
        yield from map(_rows, found.tables())


def count_unlabelled(path: Place) -> int:
    """Count the images without a class (label -1); raises like `read_rows`."""
    labels = _column(path, "label")
    return sum(pc.sum(pc.equal(column, NO_CLASS)).as_py() or 0 for column in labels)


def used_labels(path: Place) -> set[int]:
    """Return the labels that images have; raises like `read_rows`."""
    return {label for column in _column(path, "label") for label in pc.unique(column).to_pylist()}


def holds_suffix(path: Place, suffixes: Set[str]) -> bool:
    """Return whether any image's name has such a suffix, in any case; raises like `read_rows`."""
    names = (name for column in _column(path, "path") for name in column.to_pylist())
    return any(name.lower().endswith(tuple(suffixes)) for name in names)


def _column(path: Place, name: str) -> Iterator[pa.ChunkedArray]:
    """Yield one column of each shard's rows."""
    with opened(path) as found:
        yield from (table[0] for table in found.tables([name]))


def index_checksum(path: Place) -> tuple[int, str]:
    """Return (number of images, checksum of the content), as `write_index` did."""
    count = 0
    with opened(path) as found:
        schema = found.file.schema_arrow
        digest = _new_digest(schema.metadata)
        for rows in map(_rows, found.tables()):
            _digest(digest, rows.entries, schema)
            count += len(rows)
    return count, digest.hexdigest()


def read_origin(path: Place) -> Origin:
    """Return what was indexed; raises like `read_rows`."""
    with opened(path) as found:
        return found.origin


def _source(path: Place) -> Any:
    """Open a file for Arrow to read; Arrow opens a local file by itself.

    Arrow's threads release the buffers of a Python file after handing them over; if the interpreter
    exits at that moment, the process aborts.
    """
    return path.open_bytes() if path.remote else pa.OSFile(str(path))


@contextlib.contextmanager
def _readable(path: Place) -> Iterator[None]:
    """Say that the index cannot be read, if reading fails in the block."""
    try:
        yield
    except StoreError:
        raise  # No answer says nothing about the index.
    except (OSError, pa.ArrowInvalid) as error:
        # Arrow's own errors have no number. One of the disk says nothing about the index either.
        number = getattr(error, "errno", None)
        if number not in (None, errno.ENOENT, errno.EISDIR):
            raise OSError(f"{path}: cannot be read ({os.strerror(number)}); run again") from error
        raise ValueError(
            f"{path}: cannot read the index: {one_line(error)}; restore it, or make a new cache"
        ) from error


def _rows(table: pa.Table) -> Rows:
    return Rows(table["index"][0].as_py(), list(_entries(table)))


def _entries(table: pa.Table | pa.RecordBatch) -> Iterator[Entry]:
    columns = table.to_pydict()
    for name, value in Entry._field_defaults.items():
        columns.setdefault(name, [value] * len(table))
    return map(Entry._make, zip(*(columns[name] for name in Entry._fields), strict=True))


def _new_digest(metadata: dict[bytes, bytes]) -> Any:
    return hashlib.sha256(metadata.get(ORIGIN, b""))


def _digest(digest: Any, entries: list[Entry], schema: pa.Schema) -> None:
    # An image that is a file of its own has no file and offset.
    values, hashed = 5 if "file" in schema.names else 3, "sha256" in schema.names
    for entry in entries:
        text = "\0".join(map(str, entry[:values]))
        digest.update((text + ("\0" + entry.sha256.hex()) * hashed + "\n").encode())
