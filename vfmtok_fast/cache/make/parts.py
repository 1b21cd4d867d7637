"""Indexing that may be interrupted: what is listed is kept in parts, and not listed again.

A part is an index of its own, of `PART` pictures, in the folder index.parts/ beside the index to
come. A run that finds parts of the same input goes on behind the last of them; when the index is
whole, they go. Inputs of fewer pictures than that have none.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from ..format import index
from ..sources import Entry
from ..store import CacheWriteError, Place, atomic

FOLDER = "index.parts"
# Listing takes a second or so for as many on a local disk, a minute on a slow network; the memory
# for them is some 20 MB.
PART = 1 << 16
# By which inputs are listed. Another number where a listing changes, so that what an older version
# left is listed anew: two halves by different rules would have different labels.
RULES = 2


def write_in_parts(
    path: Place, entries: Callable[[Entry | None], Iterable[Entry]], shard_size: int,
    origin: index.Origin, hashed: bool, root: str | os.PathLike,
) -> tuple[int, str, int]:  # fmt: skip
    """As `index.write_index`, going on where an earlier call was interrupted.

    Args:
        path, shard_size, origin, hashed: as `index.write_index`.
        entries: the pictures in index order that come after one; all for None.
        root: the input's place, by which parts of another input are told apart.

    Returns, Raises: as `index.write_index`.
    """
    folder = path.parent / FOLDER
    mark = replace(origin, root=os.path.abspath(root), chosen={**origin.chosen, "rules": RULES})
    written = index.write_index(
        path, _every(folder, entries, shard_size, mark, hashed), shard_size, origin, hashed
    )
    remove_parts(path.parent)
    return written


def remove_parts(out: Place) -> None:
    """Remove what is left of an interrupted indexing; the last first, so the rest stays whole."""
    folder = out / FOLDER
    if not out.remote:
        folder.sweep()
    for name in sorted(folder.names(), reverse=True):
        if not atomic.is_temporary(name):  # of another process, that is listing still
            (folder / name).remove()
    if not out.remote:
        folder.remove_folder()


def _every(
    folder: Place, entries: Callable[[Entry | None], Iterable[Entry]], shard_size: int,
    mark: index.Origin, hashed: bool,
) -> Iterator[Entry]:  # fmt: skip
    number, last = 0, None
    while _is_part(folder / f"{number:05d}.parquet", mark, hashed):
        for rows in index.read_all(folder / f"{number:05d}.parquet"):
            for last in rows.entries:
                yield last
        number += 1
    part = []
    for entry in entries(last):
        yield entry
        part.append(entry)
        if len(part) == PART:
            _keep(folder / f"{number:05d}.parquet", part, shard_size, mark, hashed)
            part, number = [], number + 1


def _is_part(path: Place, mark: index.Origin, hashed: bool) -> bool:
    """Whether this is a whole part of an index of this input."""
    try:
        known = index.is_index(path) and index.read_origin(path) == mark
        return known and index.read_hashed(path) == hashed
    except ValueError:  # another process has done with it, meanwhile
        return False


def _keep(
    path: Place, part: list[Entry], shard_size: int, mark: index.Origin, hashed: bool
) -> None:
    try:
        path.parent.make_folder()
        index.write_index(path, part, shard_size, mark, hashed)
    except CacheWriteError as error:
        # Another process that has listed everything has removed the folder: no part is needed.
        if error.errno != errno.ENOENT:
            raise
