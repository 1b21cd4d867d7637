"""What a folder holds: archives, and of which kind, or images."""

from __future__ import annotations

import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from .archive import clean_name, is_hidden, members
from .base import NOT_UTF8, REASONS
from .choice import Choice
from .folder import EXTENSIONS, identity, names_in, walk

SUFFIXES = {".parquet": "parquet", ".tar": "webdataset"}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# This many names are enough to tell a folder's kind. Outer folders come first, so that archives
# near the top are seen, and a million images need not be listed to see that there are no archives.
_MOST_NAMES = 50_000
# Number of shards, and of members in each, that are looked at to tell what a folder of tars holds.
_SHARDS, _MEMBERS = 8, 64


def kind_of_folder(root: Path, choice: Choice) -> str:
    """Return the kind of input that a folder is, by its contents.

    Raises:
        ValueError: more than one thing could be meant.
    """
    if (root / "data.mdb").is_file():
        return "lmdb"
    archives, compressed, example = defaultdict(list), [], ""
    pictures: Counter[str] = Counter()  # by folder in the root, or "" for the root itself
    for path in _look(root, choice):
        suffix = os.path.splitext(path)[1].lower()
        if path.lower().endswith(COMPRESSED):
            compressed.append(path)
        elif suffix in SUFFIXES:
            archives[SUFFIXES[suffix]].append(path)
        elif suffix in EXTENSIONS:
            pictures[path.partition("/")[0] if "/" in path else ""] += 1
            example = example or path
    if compressed and (archives or not pictures):
        raise ValueError(
            f"{root}: holds {len(compressed)} compressed tars ({compressed[0]}), which cannot be "
            "read in place; decompress them to plain .tar, or leave them out with --exclude"
        )
    if not archives:
        return "folder"
    if not pictures and len(archives) == 1:
        (kind,) = archives
        return kind
    paths = [path for paths in archives.values() for path in paths]
    if len(pictures.keys() - {""}) > 1 and len(paths) == 1 and "/" not in paths[0]:
        return "folder"  # class folders, and the archive they were unpacked from
    held = [f"{len(paths)} {kind} files ({paths[0]})" for kind, paths in archives.items()]
    kinds = list(archives)
    if pictures:
        held.append(f"{pictures.total()} pictures ({example})")
        kinds.append("folder")
    raise ValueError(
        f"{root}: holds {' and '.join(held)}; say what is meant with --input "
        f"{' or --input '.join(kinds)}, or leave some out with --exclude"
    )


def _look(root: Path, choice: Choice) -> Iterator[str]:
    """Yield relative paths of a folder's files, outer folders first, up to about `_MOST_NAMES`."""
    seen, known = 0, set()
    folders = deque([("", os.fspath(root))])
    while folders and seen < _MOST_NAMES:
        shown, folder = folders.popleft()
        place = identity(folder)
        if place is None or place in known:  # gone, or a link to a folder seen before
            continue
        known.add(place)
        names, odd = names_in(folder)
        seen += len(names)
        for name in reversed(names):
            path = shown + name
            if not name.endswith("/"):
                if choice.takes(path):
                    yield path
            elif not choice.leaves_out(path.rstrip("/")):
                folders.append((path, os.path.join(folder, odd.get(name, name))))


def archives_in(root: Path, suffix: str, choice: Choice) -> tuple[str, ...]:
    """Return relative paths of a folder's archives, at any depth, in index order.

    Raises:
        ValueError: one of them has a name that is not UTF-8.
    """
    found = list(walk(root, "", choice, frozenset({suffix})))
    for path, size in found:
        if size == NOT_UTF8:
            raise ValueError(f"{root / path}: {REASONS[size]}")
    return tuple(path for path, _ in found)


def check_shards(root: Path, names: tuple[str, ...]) -> None:
    """Refuse a folder of tars that are not WebDataset shards.

    Raises:
        ValueError: the tars hold tars, or images and nothing that goes with them.
    """
    alone = ""
    for name in names[:_SHARDS]:
        suffixes = suffixes_in(root / name)
        if ".tar" in suffixes:
            raise ValueError(
                f"{root}: holds tar files that are not WebDataset shards ({name} holds tars, like "
                f"ILSVRC2012); give one of the files itself, such as {root / name}"
            )
        if suffixes - EXTENSIONS:
            return
        if suffixes:
            alone = alone or name
    if alone:
        raise ValueError(
            f"{root}: holds tar files of pictures without .cls or anything else that goes with "
            f"them ({alone}); give one of the files itself, whose folders are the classes, or take "
            "them as shards without labels: --input webdataset"
        )


def suffixes_in(path: Path) -> set[str]:
    """Return the suffixes of a tar's first members; none if it is damaged: listing reports that."""
    found = set()
    try:
        with open(path, "rb") as file:
            for member in islice(members(file, path), _MEMBERS):
                name = clean_name(member.name)
                if name and not member.isdir() and not is_hidden(name):
                    found.add(os.path.splitext(name)[1].lower())
    except (OSError, ValueError):
        return set()
    return found
