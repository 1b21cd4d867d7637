"""The index: which pictures a cache holds, in which order, with which labels.

The layout is that of torchvision's ImageFolder: the folders directly under the root are the
classes, numbered in sorted order (an empty one keeps its number), and a class folder is searched to
any depth. Pictures that lie directly in the root have no class: label -1. Names that start with a
dot are skipped (.DS_Store, ._copies, .git). Links are followed, except into a folder that they are
already inside of. Order: by relative POSIX path, as sorted() orders the strings.

Nothing here holds more than one folder's names, so that a million pictures index in little memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .atomic import atomic_file

EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .avif"
    " .mpo".split()
)

NO_CLASS = -1
# Sizes that are no sizes. Such a file keeps its place in the index and is quarantined later.
NO_SIZE = -1  # could not be examined: a link to nowhere, a link to itself
NOT_UTF8 = -2  # its path cannot be written in the index; invalid bytes are shown as \xNN

_MARK = {b"vfmtok_fast": b"token cache index 1"}
_SCHEMA = pa.schema(
    [
        pa.field("index", pa.int64(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
    ],
    metadata=_MARK,
)


class ImagesChanged(ValueError):
    """The image folder is not the one that was indexed."""


@dataclass(frozen=True)
class Rows:
    """The rows of one shard: global index of the first, then path, size (bytes), label of each."""

    first: int
    paths: list[str]
    sizes: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, part: slice) -> Rows:
        start = part.indices(len(self))[0]
        return Rows(self.first + start, self.paths[part], self.sizes[part], self.labels[part])


def class_folders(root: Path) -> list[str]:
    """Names of the class folders under `root`, sorted; a class's label is its place in the list."""
    names, _ = _names(os.fspath(root))
    return sorted(name[:-1] for name in names if name.endswith("/"))


def walk(root: Path) -> Iterator[tuple[str, int]]:
    """List the pictures under `root` in index order.

    Args:
        root: an existing folder.

    Yields:
        (relative POSIX path, size in bytes); instead of the size NO_SIZE or NOT_UTF8 where a file
        cannot be examined or named.

    Raises:
        ValueError: a folder cannot be listed.
    """
    top = os.fspath(root)
    # Per open folder: its names (last first), its path, its shown relative path, and its identity,
    # which is how a link back into a folder above is noticed.
    stack = [(_names(top), top, "", _identity(top))]
    while stack:
        (names, odd), folder, shown_folder, _ = stack[-1]
        if not names:
            stack.pop()
            continue
        name = names.pop()
        path, shown = os.path.join(folder, odd.get(name, name)), shown_folder + name
        if name.endswith("/"):
            identity = _identity(path)
            if identity is not None and all(identity != above[3] for above in stack):
                stack.append((_names(path), path, shown, identity))
        elif os.path.splitext(name)[1].lower() in EXTENSIONS:
            try:
                status = os.stat(path)
            except OSError:
                yield shown, NO_SIZE
                continue
            if stat.S_ISREG(status.st_mode):  # a pipe or a device would block or never end
                yield shown, (status.st_size if _is_utf8(path[len(top) :]) else NOT_UTF8)


def write_index(
    path: Path, entries: Iterable[tuple[str, int]], classes: list[str], shard_size: int
) -> tuple[int, str]:
    """Write index.parquet, one row group per shard, without holding more than one of them.

    Args:
        path: the file to write.
        entries: (relative path, size) in index order, as `walk` yields them.
        classes: the class folders; an entry's label is the place of its first folder in this list.
        shard_size: pictures per shard.

    Returns:
        (number of pictures, checksum of the index's content).

    Raises:
        CacheWriteError: the file cannot be written.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    entries = iter(entries)
    digest = hashlib.sha256()
    count = 0
    with atomic_file(path) as file, pq.ParquetWriter(file, _SCHEMA) as writer:
        while chunk := list(islice(entries, shard_size)):
            paths, sizes = (list(column) for column in zip(*chunk, strict=True))
            labels = [_label(name, numbers) for name in paths]
            rows = Rows(count, paths, sizes, labels)
            columns = [list(range(count, count + len(rows))), paths, sizes, labels]
            writer.write_table(pa.table(columns, schema=_SCHEMA))
            _digest(digest, rows)
            count += len(rows)
    return count, digest.hexdigest()


def is_index(path: Path) -> bool:
    """Whether a file is an index that this module wrote."""
    try:
        return (pq.read_schema(path).metadata or {}).get(b"vfmtok_fast") == _MARK[b"vfmtok_fast"]
    except (OSError, pa.ArrowInvalid):
        return False


def read_rows(path: Path, shard: int) -> Rows:
    """Read the rows of one shard.

    Raises:
        ValueError: the file is missing or damaged, or has no such shard.
    """
    with _opened(path) as file:
        if not 0 <= shard < file.num_row_groups:
            raise ValueError(f"{path}: has {file.num_row_groups} shards, no shard {shard}")
        table = file.read_row_group(shard)
    return _rows(table.to_pydict())


def read_all(path: Path) -> Iterator[Rows]:
    """Read the rows of all shards, one shard at a time; raises like `read_rows`."""
    with _opened(path) as file:
        for shard in range(file.num_row_groups):
            yield _rows(file.read_row_group(shard).to_pydict())


def index_checksum(path: Path) -> tuple[int, str]:
    """(number of pictures, checksum of the content), as `write_index` returned them."""
    digest = hashlib.sha256()
    count = 0
    for rows in read_all(path):
        _digest(digest, rows)
        count += len(rows)
    return count, digest.hexdigest()


def check_unchanged(root: Path, path: Path, classes: list[str]) -> None:
    """Refuse to go on with a folder that has other pictures than the index.

    A picture that has gone is no reason to refuse: its tokens may be cached already, and where they
    are not, its slot is quarantined. A picture that came, or whose size changed, is, because the
    cache could not say so.

    Raises:
        ImagesChanged: one line with what changed, how often, and the first case.
    """
    now = class_folders(root)
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
    for name, size in walk(root):
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
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            if (file.schema_arrow.metadata or {}).get(b"vfmtok_fast") != _MARK[b"vfmtok_fast"]:
                raise ValueError(f"{path}: not an index of a token cache")
            yield file
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot read the index: {reason}") from error


def _rows(table: dict[str, list]) -> Rows:
    return Rows(table["index"][0], table["path"], table["size"], table["label"])


def _digest(digest: hashlib._Hash, rows: Rows) -> None:
    for name, size, label in zip(rows.paths, rows.sizes, rows.labels, strict=True):
        digest.update(f"{name}\0{size}\0{label}\n".encode())


def _label(path: str, numbers: dict[str, int]) -> int:
    folder, slash, _ = path.partition("/")
    return numbers.get(folder, NO_CLASS) if slash else NO_CLASS


def _names(folder: str) -> tuple[list[str], dict[str, str]]:
    """The shown names in a folder in reverse order, and the names on disk of those that differ.

    A folder's shown name ends with a slash; with it, sorting each folder by itself gives the order
    of the whole paths ("a-b/x" comes before "a/x"). One string per name: a folder may hold a
    million.
    """
    names, odd = [], {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = entry.name if _is_utf8(entry.name) else _shown(entry.name)
                if _is_folder(entry):
                    name += "/"
                if name.rstrip("/") != entry.name:
                    odd[name] = entry.name
                names.append(name)
    except FileNotFoundError:
        pass  # it vanished while its parent was walked
    except OSError as error:
        raise ValueError(
            f"{_shown(folder).rstrip('/')}: cannot list this folder: {error.strerror}"
        ) from error
    names.sort(reverse=True)
    return names, odd


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # os.scandir smuggles other bytes in as lone surrogates
        return False
    return True


def _shown(name: str) -> str:
    """The name as text: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _identity(folder: str) -> tuple[int, int] | None:
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino
