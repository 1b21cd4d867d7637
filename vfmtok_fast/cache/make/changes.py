"""Check that an input is still the one that was indexed, and extend a cache by what was added.

New images go after the existing ones, so no row and no label ever moves. Only the last shard is
made again, if it was not full. An index and its manifest cannot be renamed in one step, so both are
first written next to the old ones, the manifest last. From then on, every process that finds them
puts them in place, and may do so repeatedly.
"""

from __future__ import annotations

import contextlib
import heapq
import unicodedata
from collections.abc import Iterator, Set
from dataclasses import replace
from itertools import chain, groupby
from operator import itemgetter

from ...images import HEIF_SUFFIXES
from ..format import index
from ..format.differences import differences
from ..format.index import INDEX
from ..format.manifest import Manifest, read_manifest
from ..format.shards import COMPLETE, read_quarantine, shard_path
from ..sources import Entry, Source
from ..sources.folder import label_of
from ..store import Place
from .ahead import hashed_entries
from .install import NEXT_INDEX, NEXT_MANIFEST, install, is_index_of, read_newer

# Inputs made of several archive files, each of which is taken or left out as a whole.
ARCHIVES = ("webdataset", "parquet")


def _advice(only_added: bool) -> str:
    """Say what to do about a changed input; only pure additions can extend a cache."""
    extend = "extend the cache (--extend), " if only_added else ""
    return f"restore them, {extend}or cache into a new folder"


class ImagesChanged(ValueError):
    """The input is not the one that was indexed."""


def check_unchanged(
    source: Source, path: Place, classes: list[str], quarantined: Set[str] = frozenset()
) -> None:
    """Refuse to go on if the input has other images than the index at `path`.

    A missing image in a folder is no reason to refuse: its tokens may be cached already, and if
    they are not, its slot is quarantined. A new image, or one whose size changed, is a reason,
    because the cache could not record it. Paths in `quarantined` are exempt, because they have no
    tokens yet. In an archive, every file must have the same size as before.

    Raises:
        ImagesChanged: one line with what changed, how often, and the first case.
    """
    origin, now = index.read_origin(path), source.files()
    _check_kind(source, origin, now == origin.files)
    if origin.files is None:
        _check_pictures(source, path, classes, quarantined)
    else:
        _check_files(source, origin, now)


def folder_classes(source: Source) -> list[str]:
    """Return the classes that the labels of a folder number; an archive's cannot change."""
    return source.classes(-1) if source.files() is None else []


def check_classes(source: Source, begun: list[str]) -> None:
    """Refuse labels that were made while class folders came or went: they number other classes.

    Raises:
        ImagesChanged: the class folders are not those from before the listing.
    """
    if differing := sorted(set(begun) ^ set(folder_classes(source))):
        raise ImagesChanged(
            f"{source.root}: the class folders changed while their pictures were listed (first: "
            f"{differing[0]!r}); run again when they are all there"
        )


def _check_kind(source: Source, origin: index.Origin, has_files: bool) -> None:
    """Require an input of the same kind, with the same choice of its files and columns.

    For archives, patterns choose whole files. Other patterns are accepted if the input has the
    files that were indexed (`has_files`), for example --split after files of another split came.
    """
    if origin.kind != source.kind:
        raise ImagesChanged(
            f"{source.root}: is a {source.kind} input, but the cache was made from {origin.kind}; "
            f"give the same input (--input {origin.kind}), or cache into a new folder"
        )
    patterns = {"include", "exclude"} if has_files and source.kind in ARCHIVES else ()
    there, here = (
        {name: value for name, value in chosen.items() if name not in patterns}
        for chosen in (origin.chosen, source.chosen)
    )
    if differing := differences(there, here):
        raise ImagesChanged(
            f"{source.root}: the cache was made from other files or columns of it: {differing}; "
            "choose the same, or cache into a new folder"
        )


def _check_files(source: Source, origin: index.Origin, now: dict[str, int]) -> None:
    differing = sorted(
        name for name in origin.files.keys() | now.keys() if origin.files.get(name) != now.get(name)
    )
    if differing:
        advice = _advice(not any(name in origin.files for name in differing))
        raise ImagesChanged(
            f"{source.root}: {len(differing)} of its files changed since they were indexed "
            f"(first: {differing[0]!r}, {_bytes(origin.files.get(differing[0]))} then, "
            f"{_bytes(now.get(differing[0]))} now); {advice}"
        )


def _bytes(size: int | None) -> str:
    return "not there" if size is None else f"{size} bytes"


def _check_pictures(source: Source, path: Place, classes: list[str], quarantined: Set[str]) -> None:
    root, now = source.root, source.classes(-1)
    if set(now) != set(classes):
        differing = sorted(set(now) ^ set(classes))
        alike = _normal(now) == _normal(classes)
        raise ImagesChanged(
            f"{root}: the class folders changed since they were indexed "
            f"({len(classes)} then, {len(now)} now; first: {differing[0]!r}); "
            + (
                "only their Unicode form differs (NFC or NFD), as after a copy to another system; "
                if alike
                else ""
            )
            + _advice(set(now) >= set(classes))
        )
    added, changed, gone, first, _ = _count(source, path, quarantined)
    if added or changed:
        raise ImagesChanged(
            f"{root}: changed since it was indexed ({added} added, {changed} with another size"
            f"{f', {gone} gone' if gone else ''}; first: {first!r}); "
            f"{_advice(not changed)}"
        )


def _normal(names: list[str]) -> set[str]:
    return {unicodedata.normalize("NFC", name) for name in names}


def _count(
    source: Source, path: Place, quarantined: Set[str]
) -> tuple[int, int, int, str, list[tuple[Entry, Entry]]]:
    """Count the images added, resized and gone, and name the first that was added or resized.

    Quarantined images that still exist are not counted but listed, as they were and as they are,
    because they may have been repaired.
    """
    added = changed = gone = 0
    first, doubtful = "", []
    for old, new in _compare(source, path, quarantined):
        if new is None:
            gone += 1
        elif old is not None and old.path in quarantined:
            doubtful.append((old, new))
        else:
            added, changed = added + (old is None), changed + (old is not None)
            first = first or new.path
    return added, changed, gone, first, doubtful


def quarantined_in(out: Place) -> Set[str]:
    """Return the paths of a cache's quarantined images, as far as their lists are intact."""
    paths: set[str] = set()
    for number in (name.removesuffix(".jsonl") for name in (out / "quarantine").names()):
        if number.isdigit():
            with contextlib.suppress(ValueError):  # torn or damaged: its shard is made again
                paths |= {entry["path"] for entry in read_quarantine(out, int(number))[0]}
    return paths


def _compare(
    source: Source, path: Place, doubtful: Set[str] = frozenset()
) -> Iterator[tuple[Entry | None, Entry | None]]:
    """Yield the images of a folder that differ from the index: as indexed, and as they are now.

    None stands for an image that was not indexed or is gone. Paths in `doubtful` are always
    yielded.
    """
    then = ((entry.path, "then", entry) for entry in _sorted(path))
    now = ((entry.path, "now", entry) for entry in source.entries())
    for name, both in groupby(heapq.merge(now, then), key=itemgetter(0)):
        found = {when: entry for _, when, entry in both}
        old, new = found.get("then"), found.get("now")
        if old is None or new is None or old.size != new.size or name in doubtful:
            yield old, new


def _sorted(path: Place) -> Iterator[Entry]:
    """Yield all indexed images by path, merging in the later additions."""
    with index.opened(path) as found:
        starts = (0, *found.origin.runs)
        runs = [found.entries(*ends) for ends in zip(starts, (*starts[1:], None), strict=True)]
        yield from heapq.merge(*runs, key=lambda entry: entry.path)


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
    _check_kind(source, origin, (origin.files or {}).items() <= (now or {}).items())
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
        check_classes(source, classes)
    else:
        classes = source.classes(max(highest, len(found.classes) - 1))
        if classes[: len(found.classes)] != found.classes:
            raise ImagesChanged(
                f"{source.root}: what was added changes the names or numbers of the classes; "
                "cache into a new folder"
            )
    if not found.heif and index.holds_suffix(out / NEXT_INDEX, HEIF_SUFFIXES):
        raise ImagesChanged(
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
    added, changed, _, _, doubtful = _count(source, path, quarantined_in(out))
    classes = source.classes(-1)
    lost = sorted(set(found.classes) - set(classes))
    if changed or lost:
        raise ImagesChanged(
            f"{source.root}: only new pictures can be added, but {changed} pictures have another "
            f"size, and {len(lost)} classes are gone; restore them, or cache into a new folder"
        )
    classes = [*found.classes, *sorted(set(classes) - set(found.classes))]
    if not added and classes == found.classes:
        return None, classes, doubtful
    numbers = {name: number for number, name in enumerate(classes)}
    new = (new for old, new in _compare(source, path) if old is None)
    labelled = (entry._replace(label=label_of(entry.path, numbers)) for entry in new)
    return labelled, classes, doubtful


def _new_files(source: Source, origin: index.Origin) -> Iterator[Entry] | None:
    now = source.files()
    _check_files(source, origin, {name: now[name] for name in origin.files if name in now})
    names = sorted(set(now) - set(origin.files))
    return replace(source, names=tuple(names)).entries() if names else None
