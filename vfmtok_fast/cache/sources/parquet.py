"""Parquet files with the pictures' bytes in them, as the Hugging Face hub keeps image data sets.

    image: struct<bytes: binary, path: string>  (or plain binary)      label: integer

Files are taken in the order of their names. To index, only the labels are read, so the size of a
picture is not known before it is read; what changed is seen by the sizes of the files.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..format.shards import BAD, GONE
from .base import (
    BAD_LABEL,
    NO_CLASS,
    UNKNOWN,
    BadImage,
    Entry,
    behind,
    check_bytes,
    check_known,
    check_label,
    files_from,
    numbered_classes,
    sizes_of,
)

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "image_bytes")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")

# Rows that are read together, and how many are kept: decoding threads ask for rows in nearly
# ascending order. 128 photos are some 15 MB.
_BATCH = 16
_KEPT = 128


@dataclass
class ParquetSource:
    """Rows of the Parquet files `names` in the folder `root`."""

    root: Path
    names: tuple[str, ...]
    kind = "parquet"
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _rows: OrderedDict[tuple[str, int], bytes | None] = field(
        default_factory=OrderedDict, repr=False
    )
    # The walk through one file: its name, the row that comes next, the batches to come.
    _walk: tuple[str, int, Iterator[pa.RecordBatch]] | None = field(default=None, repr=False)

    def __reduce__(self) -> tuple:
        # Locks and open files do not travel.
        return type(self), (self.root, self.names)

    def files(self) -> dict[str, int]:
        return sizes_of(self.root, list(self.names))

    def entries(self, after: Entry | None = None) -> Iterator[Entry]:
        return behind(self._entries(files_from(self.names, after)), after)

    def _entries(self, names: Sequence[str]) -> Iterator[Entry]:
        for name in names:
            path = self.root / name
            with _opened(path) as file:
                _image_column(file, path)
                column = _label_column(file, path)
                row = 0
                for label in _labels(file, column):
                    known = NO_CLASS if label is None else check_label(label)
                    size = UNKNOWN if known is not None else BAD_LABEL
                    label = NO_CLASS if known is None else known
                    yield Entry(f"{name}/{row:08d}", size, label, name, row)
                    row += 1

    def classes(self, highest: int) -> list[str]:
        """The names that Hugging Face's `datasets` writes beside a ClassLabel, or numbers."""
        path = self.root / self.names[0]
        with _opened(path) as file:
            column = _label_column(file, path)
            names = _class_names(file.schema_arrow.metadata or {}, column)
        return names if len(names) > highest else numbered_classes(highest)

    def read(self, entry: Entry) -> bytes:
        check_known(entry)
        with self._lock:
            data = self._row(entry.file, entry.offset)
        if data is None:
            raise BadImage(BAD, "holds no bytes of a picture")
        return check_bytes(entry, data)

    def _row(self, name: str, row: int) -> bytes | None:
        if (name, row) not in self._rows:
            self._load(name, row)
        if (name, row) not in self._rows:
            raise BadImage(GONE, "gone since it was indexed")
        return self._rows[name, row]

    def _load(self, name: str, row: int) -> None:
        """Walk on to a row, or start anew where the walk is past it or far before it."""
        path = self.root / name
        try:
            if (
                self._walk is None
                or self._walk[0] != name
                or not (self._walk[1] <= row < self._walk[1] + _KEPT)
            ):
                self._walk = (name, *_walk_from(path, row))
            _, at, batches = self._walk
            for batch in batches:
                for value in _bytes_of(batch.column(0)):
                    self._rows[name, at] = value
                    at += 1
                while len(self._rows) > _KEPT:
                    self._rows.popitem(last=False)
                self._walk = (name, at, batches)
                if at > row:
                    return
        except (OSError, pa.ArrowInvalid) as error:
            self._walk = None
            reason = " ".join(str(error).split())
            raise OSError(f"{path}: cannot be read any more: {reason}") from error
        self._walk = None


def _walk_from(path: Path, row: int) -> tuple[int, Iterator[pa.RecordBatch]]:
    """The row group that a row lies in: its first row, and batches from there to the file's end."""
    file = pq.ParquetFile(path, memory_map=True)
    first = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < first + count:
            return first, _batches(file, group, _image_column(file, path))
        first += count
    file.close()
    return first, iter(())


def _batches(file: pq.ParquetFile, first: int, column: str) -> Iterator[pa.RecordBatch]:
    groups = range(first, file.num_row_groups)
    with file:
        # One thread: the decoding of pictures is what the cores are for.
        yield from file.iter_batches(_BATCH, groups, columns=[column], use_threads=False)


def _labels(file: pq.ParquetFile, column: str | None) -> Iterator[int | None]:
    for group in range(file.num_row_groups):
        if column is None:
            yield from (None for _ in range(file.metadata.row_group(group).num_rows))
            continue
        yield from file.read_row_group(group, columns=[column]).column(0).to_pylist()


def _bytes_of(column: pa.Array) -> list[bytes | None]:
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    return column.to_pylist()


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(file: pq.ParquetFile, path: Path) -> str:
    """Name of the leaf column with the pictures' bytes."""
    schema = file.schema_arrow
    plain = []
    for column in schema:
        if pa.types.is_struct(column.type):
            index = column.type.get_field_index("bytes")
            if index >= 0 and _is_bytes(column.type.field(index).type):
                return f"{column.name}.bytes"
        elif _is_bytes(column.type) and column.name in IMAGE_COLUMNS:
            plain.append(column.name)
    if not plain:
        raise ValueError(
            f"{path}: no pictures in it: expected a column struct<bytes, path>, or binary named "
            f"{', '.join(IMAGE_COLUMNS)}; got {', '.join(schema.names) or 'no columns'}"
        )
    return plain[0]


def _label_column(file: pq.ParquetFile, path: Path) -> str | None:
    schema = file.schema_arrow
    column = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if column is not None and not pa.types.is_integer(schema.field(column).type):
        raise ValueError(
            f"{path}: column {column!r} must hold class numbers, is {schema.field(column).type}"
        )
    return column


def _class_names(metadata: dict[bytes, bytes], column: str | None) -> list[str]:
    """Names of a ClassLabel, as `datasets` writes them; empty if there are none."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        names = features[column]["names"]
    except (ValueError, KeyError, TypeError):  # other programs' metadata, or none
        return []
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    return []


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            yield file
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read as Parquet: {reason}") from error
