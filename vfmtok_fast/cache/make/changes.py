"""Check that an input is still the one that was indexed."""

from __future__ import annotations

import contextlib
import heapq
import unicodedata
from collections.abc import Iterable, Iterator, Set
from itertools import groupby
from operator import itemgetter

from ..format import index
from ..format.differences import differences
from ..format.shards import read_quarantine
from ..sources import Entry, Source
from ..sources.folder import label_of
from ..store import Place

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
    check_kind(source, origin, now == origin.files)
    if origin.files is None:
        _check_pictures(source, path, classes, quarantined)
    else:
        check_files(source, origin, now)


def folder_classes(source: Source) -> list[str]:
    """Return the classes that the labels of a folder number; an archive's cannot change."""
    return source.classes(-1) if source.files() is None else []


def labelled(entries: Iterable[Entry], classes: list[str]) -> Iterator[Entry]:
    """Yield a folder's entries with the numbers that these classes have, whatever comes or goes."""
    numbers = {name: number for number, name in enumerate(classes)}
    return (entry._replace(label=label_of(entry.path, numbers)) for entry in entries)


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


def check_kind(source: Source, origin: index.Origin, has_files: bool) -> None:
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


def check_files(source: Source, origin: index.Origin, now: dict[str, int]) -> None:
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
    added, changed, gone, first, _ = count_changes(source, path, quarantined)
    if added or changed:
        raise ImagesChanged(
            f"{root}: changed since it was indexed ({added} added, {changed} with another size"
            f"{f', {gone} gone' if gone else ''}; first: {first!r}); "
            f"{_advice(not changed)}"
        )


def _normal(names: list[str]) -> set[str]:
    return {unicodedata.normalize("NFC", name) for name in names}


def count_changes(
    source: Source, path: Place, quarantined: Set[str]
) -> tuple[int, int, int, str, list[tuple[Entry, Entry]]]:
    """Count the images added, resized and gone, and name the first that was added or resized.

    Quarantined images that still exist are not counted but listed, as they were and as they are,
    because they may have been repaired.
    """
    added = changed = gone = 0
    first, doubtful = "", []
    for old, new in compare(source, path, quarantined):
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


def compare(
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
