"""How far a cache is, also while it is being built; reads headers only, and writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...temporary import is_temporary
from ..format import shards
from ..format.index import INDEX
from ..format.manifest import NAME, Manifest, read_manifest
from ..store import Place, place


@dataclass(frozen=True)
class Status:
    """The state of a cache folder.

    Args:
        state: "indexing" (no manifest yet), "incomplete", or "complete".
        images: images in the index; 0 while indexing.
        done: images in finished shards, bad ones included.
        bad: quarantined images among them.
        shards: shards in all.
        shards_done: finished shards.
        damaged: numbers of the shards whose header cannot be read or does not belong here; the next
            run encodes them again.
        writing: files that are being written, or were when their process died.
        views: names of the views.
    """

    state: str
    images: int
    done: int
    bad: int
    shards: int
    shards_done: int
    damaged: tuple[int, ...]
    writing: int
    views: tuple[str, ...]


def status(out: str | os.PathLike) -> Status:
    """Return the state of a cache, without its images or its tokenizer.

    Args:
        out: the cache's folder.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the manifest is damaged or not ours.
        OSError: the disk or the store does not give a shard.
    """
    out = place(out)
    writing = sum(
        is_temporary(name)
        for folder in (out, out / "shards", out / "quarantine")
        for name in folder.names()
    )
    begun = writing or (out / INDEX).exists()
    if begun and not (out / NAME).exists():
        return Status("indexing", 0, 0, 0, 0, 0, (), writing, ())
    found = read_manifest(out)
    numbers = range(found.shards)
    headers = list(out.spread(lambda number: shards.finished(out, number, found), numbers))
    finished = [header for header in headers if header is not None]
    missing = [number for number in numbers if headers[number] is None]
    complete = not missing and (out / shards.COMPLETE).exists()
    return Status(
        state="complete" if complete else "incomplete",
        images=found.images,
        done=sum(header.count for header in finished),
        bad=sum(header.bad for header in finished),
        shards=found.shards,
        shards_done=len(finished),
        damaged=tuple(number for number in missing if _is_damaged(out, number, found)),
        writing=writing,
        views=tuple(found.views),
    )


def _is_damaged(out: Place, number: int, found: Manifest) -> bool:
    try:
        header = shards.read_header(shards.shard_path(out, number))
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return not shards.is_outgrown(header, number, found)


def failures(out: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yield the quarantined images of the finished shards, in index order.

    Args:
        out: the cache's folder.

    Yields:
        A dict with index, path, reason and status of each.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the manifest or a quarantine list is damaged.
    """
    out = place(out)
    for number in range(read_manifest(out).shards):
        if shards.shard_path(out, number).exists():
            yield from shards.read_quarantine(out, number)[0]
