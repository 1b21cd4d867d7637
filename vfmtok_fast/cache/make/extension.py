"""Extend a cache by the images that were added to its input.

New images go after the existing ones, so no row and no label ever moves. Only the last shard is
made again, if it was not full. An index and its manifest cannot be renamed in one step, so both are
first written next to the old ones, the manifest last. From then on, every process that finds them
puts them in place, and may do so repeatedly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from ...images import HEIF_SUFFIXES
from ..format import index
from ..format.index import INDEX
from ..format.manifest import Manifest, read_manifest
from ..format.shards import COMPLETE, shard_path
from ..sources import Entry, Source
from ..store import Place
from . import changes
from .ahead import hashed_entries
from .install import NEXT_INDEX, NEXT_MANIFEST, install, is_index_of, read_newer


def extend(source: Source, out: Place, found: Manifest, workers: int) -> Manifest:
    """Add the images that came since a cache was indexed; `encode_shards` makes their tokens.

    Quarantined images that now have another size or hash, because somebody repaired them, are
    indexed again in their place, and their shards are removed. If the index holds hashes,
    `workers` threads read the images.

    Returns:
        The manifest that holds from now on; `found` if nothing was added.

    Raises:
        ImagesChanged: images have changed, classes are gone, or the input cannot extend the cache.
    """
    while (extended := _extended(source, out, found, workers)) is None:
        found = read_newer(out, found)
    return extended


def _extended(source: Source, out: Place, found: Manifest, workers: int) -> Manifest | None:
    """Like `extend`; None if another process changed the cache while this one was reading it."""
    path = out / INDEX
    origin, now = index.read_origin(path), source.files()
    changes.check_kind(source, origin, (origin.files or {}).items() <= (now or {}).items())
    doubtful: list[tuple[Entry, Entry]] = []
    if origin.files is None:
        new, classes, doubtful = _new_pictures(source, out, found)
    else:
        new, classes = _new_files(source, origin), None
    if origin.hashed:
        new = None if new is None else hashed_entries(source, new, workers)
        read = hashed_entries(source, (entry for _, entry in doubtful), workers)
        doubtful = [(then, entry) for (then, _), entry in zip(doubtful, read, strict=True)]
    mended = {entry.path: entry for then, entry in doubtful if _was_mended(then, entry)}
    if new is None and not mended:
        return found if _is_current(out, found) else None
    runs = origin.runs if new is None else (*origin.runs, found.images)
    later = replace(origin, files=now, runs=runs, chosen=source.chosen)
    old = chain.from_iterable(rows.entries for rows in index.read_all(path))
    places: list[int] = []
    entries = chain(_replaced(old, mended, places), new or ())
    written = index.write_index(out / NEXT_INDEX, entries, found.shard_size, later)
    count, checksum, highest = written
    if classes is not None:
        changes.check_classes(source, classes)
    else:
        classes = source.classes(max(highest, len(found.classes) - 1))
        if classes[: len(found.classes)] != found.classes:
            raise changes.ImagesChanged(
                f"{source.root}: what was added changes the names or numbers of the classes; "
                "cache into a new folder"
            )
    if not found.heif and index.holds_suffix(out / NEXT_INDEX, HEIF_SUFFIXES):
        raise changes.ImagesChanged(
            f"{source.root}: .heic and .heif pictures cannot be added to a cache without any, "
            "because its fingerprint lacks their decoder's version; cache into a new folder"
        )
    if not _is_current(out, found):
        return None
    (out / COMPLETE).remove()
    # Before the manifest, because a process that sees the new manifest must not find these shards.
    # If this is interrupted, `repair` still finds that their images can be read now.
    for number in {place // found.shard_size for place in places}:
        shard_path(out, number).remove()
    Manifest(found.covers, found.shard_size, count, classes, checksum).write(out, NEXT_MANIFEST)
    install(out)
    return read_manifest(out)


def _is_current(out: Place, found: Manifest) -> bool:
    """Return whether a cache is still what it was when its manifest was read."""
    there = is_index_of(found, out / INDEX)
    return there and read_manifest(out) == found


def _was_mended(then: Entry, now: Entry) -> bool:
    # An image that cannot be read has no hash.
    return now.size != then.size or now.sha256 not in (b"", then.sha256)


def _replaced(old: Iterator[Entry], mended: dict[str, Entry], places: list[int]) -> Iterator[Entry]:
    """Yield the entries with repaired ones replaced, and append their positions to `places`."""
    for place, entry in enumerate(old):
        if entry.path in mended:
            places.append(place)
            now = mended[entry.path]
            entry = entry._replace(size=now.size, sha256=now.sha256)
        yield entry


def _new_pictures(
    source: Source, out: Place, found: Manifest
) -> tuple[Iterator[Entry] | None, list[str], list[tuple[Entry, Entry]]]:
    """Return the new images, all classes, and quarantined images as they were and as they are."""
    path = out / INDEX
    added, changed, _, _, doubtful = changes.count_changes(
        source, path, changes.quarantined_in(out)
    )
    classes = source.classes(-1)
    lost = sorted(set(found.classes) - set(classes))
    if changed or lost:
        raise changes.ImagesChanged(
            f"{source.root}: only new pictures can be added, but {changed} pictures have another "
            f"size, and {len(lost)} classes are gone; restore them, or cache into a new folder"
        )
    classes = [*found.classes, *sorted(set(classes) - set(found.classes))]
    if not added and classes == found.classes:
        return None, classes, doubtful
    new = (new for old, new in changes.compare(source, path) if old is None)
    return changes.labelled(new, classes), classes, doubtful


def _new_files(source: Source, origin: index.Origin) -> Iterator[Entry] | None:
    now = source.files()
    changes.check_files(source, origin, {name: now[name] for name in origin.files if name in now})
    names = sorted(set(now) - set(origin.files))
    return replace(source, names=tuple(names)).entries() if names else None
