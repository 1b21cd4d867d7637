"""The index: which pictures a cache holds, in which order, with which labels.

One format for every kind of input (`vfmtok_fast.cache.sources`). Pictures that lie inside larger
files have two more columns, `file` and `offset`, that say where; and the index then names those
files with their sizes, by which a change is noticed.

Nothing here holds more than one shard's rows, so that a million pictures index in little memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .atomic import atomic_file
from .sources import Entry, Source
from .store import Place, open_binary

_MARK = {b"vfmtok_fast": b"token cache index 1"}
_ORIGIN = b"vfmtok_fast.origin"
_FIELDS = [
    pa.field("index", pa.int64(), nullable=False),
    pa.field("path", pa.string(), nullable=False),
    pa.field("size", pa.int64(), nullable=False),
    pa.field("label", pa.int32(), nullable=False),
]
_PLACE = [
    pa.field("file", pa.string(), nullable=False),
    pa.field("offset", pa.int64(), nullable=False),
]


class ImagesChanged(ValueError):
    """The input is not the one that was indexed."""


@dataclass(frozen=True)
class Rows:
    """The rows of one shard: global index of the first, then path, size (bytes), label of each.

    `files` and `offsets` are empty where each picture is a file of its own.
    """

    first: int
    paths: list[str]
    sizes: list[int]
    labels: list[int]
    files: list[str]
    offsets: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, part: slice) -> Rows:
        columns = (self.paths, self.sizes, self.labels, self.files, self.offsets)
        first = self.first + part.indices(len(self))[0]
        return Rows(first, *(column[part] for column in columns))

    def entries(self) -> list[Entry]:
        """The rows as `Source.read` takes them."""
        place = (self.files, self.offsets) if self.files else ()
        columns = zip(self.paths, self.sizes, self.labels, *place, strict=True)
        return [Entry(*values) for values in columns]


@dataclass(frozen=True)
class Origin:
    """The kind of input that was indexed, and the size of each file that holds its pictures.

    `files` is None for a folder, where each picture is a file.
    """

    kind: str = "folder"
    files: dict[str, int] | None = None

    def metadata(self) -> dict[bytes, bytes]:
        """As the schema of index.parquet holds it."""
        if self.files is None:
            return {}
        return {_ORIGIN: json.dumps(vars(self), sort_keys=True).encode()}


def write_index(
    path: Place, entries: Iterable[Entry], shard_size: int, origin: Origin = Origin()
) -> tuple[int, str, int]:
    """Write index.parquet, one row group per shard, without holding more than one of them.

    Args:
        path: the file to write.
        entries: the pictures in index order.
        shard_size: pictures per shard.
        origin: where they come from.

    Returns:
        (number of pictures, checksum of the index's content, highest label).

    Raises:
        CacheWriteError: the file cannot be written.
    """
    placed = origin.files is not None
    schema = pa.schema(
        _FIELDS + _PLACE if placed else _FIELDS, metadata={**_MARK, **origin.metadata()}
    )
    entries = iter(entries)
    digest = _new_digest(origin.metadata())
    count, highest = 0, -1
    with atomic_file(path) as file, pq.ParquetWriter(file, schema) as writer:
        while chunk := list(islice(entries, shard_size)):
            columns = [list(column) for column in zip(*chunk, strict=True)]
            if not placed:
                columns[3:] = [[], []]
            rows = Rows(count, *columns)
            numbers = list(range(count, count + len(rows)))
            writer.write_table(pa.table([numbers, *columns[: len(schema) - 1]], schema=schema))
            _digest(digest, rows)
            count += len(rows)
            highest = max(highest, *rows.labels)
    return count, digest.hexdigest(), highest


def is_index(path: Place) -> bool:
    """Whether a file is an index that this module wrote."""
    try:
        with open_binary(path) as file:
            found = pq.read_schema(file).metadata or {}
        return found.get(b"vfmtok_fast") == _MARK[b"vfmtok_fast"]
    except (OSError, pa.ArrowInvalid):
        return False


def read_rows(path: Place, shard: int) -> Rows:
    """Read the rows of one shard.

    Raises:
        ValueError: the file is missing or damaged, or has no such shard.
    """
    with _opened(path) as file:
        if not 0 <= shard < file.num_row_groups:
            raise ValueError(f"{path}: has {file.num_row_groups} shards, no shard {shard}")
        table = file.read_row_group(shard)
    return _rows(table.to_pydict())


def read_all(path: Place) -> Iterator[Rows]:
    """Read the rows of all shards, one shard at a time; raises like `read_rows`."""
    with _opened(path) as file:
        for shard in range(file.num_row_groups):
            yield _rows(file.read_row_group(shard).to_pydict())


def index_checksum(path: Place) -> tuple[int, str]:
    """(number of pictures, checksum of the content), as `write_index` returned them."""
    with _opened(path) as file:
        digest = _new_digest(file.schema_arrow.metadata)
    count = 0
    for rows in read_all(path):
        _digest(digest, rows)
        count += len(rows)
    return count, digest.hexdigest()


def read_origin(path: Place) -> Origin:
    """What was indexed; raises like `read_rows`."""
    with _opened(path) as file:
        data = file.schema_arrow.metadata.get(_ORIGIN)
    return Origin() if data is None else Origin(**json.loads(data))


def check_unchanged(source: Source, path: Place, classes: list[str]) -> None:
    """Refuse to go on with an input that has other pictures than the index.

    A picture that has gone from a folder is no reason to refuse: its tokens may be cached already,
    and where they are not, its slot is quarantined. A picture that came, or whose size changed, is,
    because the cache could not say so. Of an archive, the size of every file must be the same.

    Raises:
        ImagesChanged: one line with what changed, how often, and the first case.
    """
    origin = read_origin(path)
    if origin.kind != source.kind:
        raise ImagesChanged(
            f"{source.root}: is a {source.kind} input, the cache was made from {origin.kind}; "
            "give the same input, or cache into a new folder"
        )
    if origin.files is None:
        _check_pictures(source, path, classes)
        return
    now = source.files()
    differing = sorted(
        name for name in origin.files.keys() | now.keys() if origin.files.get(name) != now.get(name)
    )
    if differing:
        raise ImagesChanged(
            f"{source.root}: {len(differing)} of its files changed since they were indexed "
            f"(first: {differing[0]!r}, {_bytes(origin.files.get(differing[0]))} then, "
            f"{_bytes(now.get(differing[0]))} now); restore them, or cache into a new folder"
        )


def _bytes(size: int | None) -> str:
    return "not there" if size is None else f"{size} bytes"


def _check_pictures(source: Source, path: Place, classes: list[str]) -> None:
    root, now = source.root, source.classes(-1)
    if now != classes:
        differing = sorted(set(now) ^ set(classes))
        raise ImagesChanged(
            f"{root}: the class folders changed since they were indexed "
            f"({len(classes)} then, {len(now)} now; first: {differing[0]!r}); "
            "restore them, or cache into a new folder"
        )
    indexed = (
        (name, size)
        for rows in read_all(path)
        for name, size in zip(rows.paths, rows.sizes, strict=True)
    )
    old = next(indexed, None)
    added = changed = 0
    first = ""
    for name, size, *_ in source.entries():
        while old is not None and old[0] < name:
            old = next(indexed, None)
        known = old is not None and old[0] == name
        if not known or old[1] != size:
            added, changed = added + (not known), changed + known
            first = first or name
        if known:
            old = next(indexed, None)
    if added or changed:
        raise ImagesChanged(
            f"{root}: changed since it was indexed ({added} added, {changed} with another size; "
            f"first: {first!r}); restore the files, or cache into a new folder"
        )


@contextlib.contextmanager
def _opened(path: Place) -> Iterator[pq.ParquetFile]:
    try:
        with open_binary(path) as data, pq.ParquetFile(data) as file:
            if (file.schema_arrow.metadata or {}).get(b"vfmtok_fast") != _MARK[b"vfmtok_fast"]:
                raise ValueError(f"{path}: not an index of a token cache")
            yield file
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot read the index: {reason}") from error


def _rows(table: dict[str, list]) -> Rows:
    columns = [table[name] for name in ("path", "size", "label")]
    return Rows(table["index"][0], *columns, table.get("file", []), table.get("offset", []))


def _new_digest(metadata: dict[bytes, bytes]) -> Any:
    return hashlib.sha256(metadata.get(_ORIGIN, b""))


def _digest(digest: Any, rows: Rows) -> None:
    for entry in rows.entries():
        # A picture that is a file of its own has no place inside one.
        values = entry if rows.files else entry[:3]
        digest.update(("\0".join(map(str, values)) + "\n").encode())
