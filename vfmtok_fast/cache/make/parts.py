"""Indexing that may be interrupted: listed images are kept in parts and not listed again.

A part is an index of its own, of `PART` images, in the folder index.parts/ next to the index that
is being made. A run that finds parts of the same input continues after the last of them. When the
index is complete, they are removed. Inputs of fewer images than that have no parts.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from ...temporary import is_temporary
from ..format import index
from ..format.manifest import canonical
from ..sources import Entry
from ..store import CacheWriteError, Place

FOLDER = "index.parts"
# Listing this many takes a second or so on a local disk, and a minute on a slow network; they take
# some 20 MB of memory.
PART = 1 << 16
# Version of the rules by which inputs are listed. It changes with them, so that the parts of an
# older version are listed again: two halves by different rules would have different labels.
RULES = 2


def write_in_parts(
    path: Place, entries: Callable[[Entry | None], Iterable[Entry]], shard_size: int,
    origin: index.Origin, root: str | os.PathLike, classes: Sequence[str] = (),
) -> tuple[int, str, int]:  # fmt: skip
    """Write an index like `index.write_index`, and resume where an earlier call was interrupted.

    Args:
        path, shard_size, origin: as in `index.write_index`.
        entries: returns the images in index order that follow a given one; all for None.
        root: the input's path, which tells parts of another input apart.
        classes: those that the labels of `entries` number; with others, parts are not used.

    Returns, Raises: as `index.write_index`.
    """
    folder = path.parent / FOLDER
    listed = {"rules": RULES, "classes": hashlib.sha256(canonical(list(classes))).hexdigest()}
    mark = replace(origin, root=os.path.abspath(root), chosen={**origin.chosen, **listed})
    every = _every(folder, entries, shard_size, mark)
    written = index.write_index(path, every, shard_size, origin)
    remove_parts(path.parent)
    return written


def remove_parts(out: Place) -> None:
    """Remove the parts of an interrupted indexing, last first, so that the rest stays usable."""
    folder = out / FOLDER
    if not out.remote:
        folder.sweep()
    for name in sorted(folder.names(), reverse=True):
        if not is_temporary(name):  # of another process that is still listing
            (folder / name).remove()
    if not out.remote:
        folder.remove_folder()


def _every(
    folder: Place, entries: Callable[[Entry | None], Iterable[Entry]], shard_size: int,
    mark: index.Origin,
) -> Iterator[Entry]:  # fmt: skip
    number, last = 0, None
    while _is_part(folder / f"{number:05d}.parquet", mark):
        for rows in index.read_all(folder / f"{number:05d}.parquet"):
            for last in rows.entries:
                yield last
        number += 1
    part = []
    for entry in entries(last):
        yield entry
        part.append(entry)
        if len(part) == PART:
            _keep(folder / f"{number:05d}.parquet", part, shard_size, mark)
            part, number = [], number + 1


def _is_part(path: Place, mark: index.Origin) -> bool:
    """Return whether a file is a complete part of an index of this input."""
    try:
        return index.read_origin(path) == mark
    except ValueError:  # missing or incomplete
        return False


def _keep(path: Place, part: list[Entry], shard_size: int, mark: index.Origin) -> None:
    try:
        path.parent.make_folder()
        index.write_index(path, part, shard_size, mark)
    except CacheWriteError as error:
        # Another process has listed everything and removed the folder, so no part is needed.
        if error.errno != errno.ENOENT:
            raise
