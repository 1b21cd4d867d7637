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
import hashlib
import json
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...errors import one_line
from ..store import Place, StoreError

INDEX = "index.parquet"
NO_CLASS = -1
_MARK = {b"vfmtok_fast": b"token cache index 1"}
_ORIGIN = b"vfmtok_fast.origin"
_COLUMNS = [
    ("index", pa.int64()),
    ("path", pa.string()),
    ("size", pa.int64()),
    ("label", pa.int32()),
]
_PLACE = [("file", pa.string()), ("offset", pa.int64())]
_HASH = [("sha256", pa.binary())]


class Entry(NamedTuple):
    """One image of an input.

    `path` is relative ("n01440764/n01440764_10026.JPEG", "train-0001.tar/000017.jpg") and unique,
    unless an archive holds a name twice. `size` is in bytes, or one of the negative numbers of
    `sources.base`. `label` is the class number, or -1. If images are stored inside larger files,
    `file` is that file's name relative to the input, and `offset` is the position in it: the first
    byte of the data in a tar, the row in Parquet, the key in LMDB. `sha256` is the hash of the
    image's bytes, or empty.
    """

    path: str
    size: int
    label: int
    file: str = ""
    offset: int = 0
    sha256: bytes = b""


@dataclass(frozen=True)
class Rows:
    """The images of one shard, and the global index of the first one."""

    first: int
    entries: list[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.first + part.indices(len(self))[0], self.entries[part])

    @property
    def paths(self) -> list[str]:
        """Relative path of each image."""
        return [entry.path for entry in self.entries]

    @property
    def labels(self) -> list[int]:
        """Class number of each image, or -1."""
        return [entry.label for entry in self.entries]


@dataclass(frozen=True)
class Origin:
    """What was indexed.

    Args:
        kind: kind of the input.
        files: size of each file that holds images; None for a folder, where each image is a file.
        runs: first row of each later addition; rows up to the next such row are in the input's
            order.
        root: the input's path; set only in parts of an index, which another input must not
            continue.
        chosen: what was taken from the input, see `Source.chosen`.
        hashed: whether the index has a column for the entries' hashes.
    """

    kind: str = "folder"
    files: dict[str, int] | None = None
    runs: tuple[int, ...] = ()
    root: str | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    hashed: bool = False

    def metadata(self) -> dict[bytes, bytes]:
        """Return the schema metadata of index.parquet; empty for a folder with nothing to add."""
        later = {"runs": self.runs, "root": self.root, "chosen": self.chosen}
        later = {name: value for name, value in later.items() if value}
        if self.files is None and not later:
            return {}
        content = {"kind": self.kind, "files": self.files, **later}
        return {_ORIGIN: json.dumps(content, sort_keys=True).encode()}


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
                writer.write_table(pa.table(rows, schema=schema))
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


def is_index(path: Place) -> bool:
    """Return whether a file is an index that this module wrote."""
    try:
        with _opened(path):
            return True
    except ValueError:
        return False


def read_rows(path: Place, shard: int) -> Rows:
    """Read the rows of one shard.

    Raises:
        ValueError: the file is missing or damaged, or has no such shard.
    """
    with _opened(path) as file:
        if not 0 <= shard < file.num_row_groups:
            raise ValueError(f"{path}: has {file.num_row_groups} shards, no shard {shard}")
        return _rows(file.read_row_group(shard))


def read_all(path: Place) -> Iterator[Rows]:
    """Read the rows of all shards, one shard at a time; raises like `read_rows`."""
    with _opened(path) as file:
        for shard in range(file.num_row_groups):
            yield _rows(file.read_row_group(shard))


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
    with _opened(path) as file:
        for shard in range(file.num_row_groups):
            yield file.read_row_group(shard, [name])[0]


def read_from(path: Place, start: int, end: int | None) -> Iterator[Entry]:
    """Yield the images of rows `start` to `end` - 1; raises like `read_rows`."""
    for rows in read_all(path):
        first = max(start - rows.first, 0)
        last = len(rows) if end is None else max(end - rows.first, 0)
        yield from rows.entries[first:last]


def index_checksum(path: Place) -> tuple[int, str]:
    """Return (number of images, checksum of the content), as `write_index` did."""
    count = 0
    with _opened(path) as file:
        digest = _new_digest(file.schema_arrow.metadata)
        for shard in range(file.num_row_groups):
            rows = _rows(file.read_row_group(shard))
            _digest(digest, rows.entries, file.schema_arrow)
            count += len(rows)
    return count, digest.hexdigest()


def read_origin(path: Place) -> Origin:
    """Return what was indexed; raises like `read_rows`."""
    with _opened(path) as file:
        schema = file.schema_arrow
    content = json.loads(schema.metadata.get(_ORIGIN, b"{}"))
    runs = tuple(content.get("runs", ()))
    return Origin(**{**content, "runs": runs}, hashed="sha256" in schema.names)


def _source(path: Place) -> Any:
    """Open a file for Arrow to read; Arrow opens a local file by itself.

    Arrow's threads release the buffers of a Python file after handing them over; if the interpreter
    exits at that moment, the process aborts.
    """
    return path.open_bytes() if path.remote else pa.OSFile(str(path))


@contextlib.contextmanager
def _opened(path: Place) -> Iterator[pq.ParquetFile]:
    try:
        with _source(path) as data, pq.ParquetFile(data) as file:
            if (file.schema_arrow.metadata or {}).get(b"vfmtok_fast") != _MARK[b"vfmtok_fast"]:
                raise ValueError(f"{path}: not an index of a token cache")
            yield file
    except StoreError:
        raise  # No answer says nothing about the index.
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"{path}: cannot read the index: {one_line(error)}; restore it, or make a new cache"
        ) from error


def _rows(table: pa.Table) -> Rows:
    columns = table.to_pydict()
    for name, value in Entry._field_defaults.items():
        columns.setdefault(name, [value] * len(table))
    values = zip(*(columns[name] for name in Entry._fields), strict=True)
    return Rows(columns["index"][0], list(map(Entry._make, values)))


def _new_digest(metadata: dict[bytes, bytes]) -> Any:
    return hashlib.sha256(metadata.get(_ORIGIN, b""))


def _digest(digest: Any, entries: list[Entry], schema: pa.Schema) -> None:
    # An image that is a file of its own has no file and offset.
    values, hashed = 5 if "file" in schema.names else 3, "sha256" in schema.names
    for entry in entries:
        text = "\0".join(map(str, entry[:values]))
        digest.update((text + ("\0" + entry.sha256.hex()) * hashed + "\n").encode())
