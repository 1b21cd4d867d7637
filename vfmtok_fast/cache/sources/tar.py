"""A tar of images, read in place: ILSVRC2012_img_train.tar as downloaded, or class folders.

Inner tars are classes, named after the tar ("n01440764.tar" holds class n01440764). Their images
are indexed as if they had been unpacked, in the order of sorted paths, so that this input and the
unpacked folder give the same shards. Images outside inner tars belong to the folder that they are
in, and follow in the order of the archive. Folders around all classes ("train/" in
"train/n01440764/x.JPEG") are left out of the paths.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .archive import clean_name, is_hidden, members, places, read_member
from .base import UNSAFE, Entry, Source, behind, sizes_of
from .choice import Choice, check_splits
from .contents import COMPRESSED
from .folder import EXTENSIONS, UNREADABLE, label_of, shown


class _Inner(NamedTuple):
    """An inner tar: its class, where it begins and ends, and its path."""

    folder: str
    start: int
    end: int
    path: str


class TarSource(Source):
    """Images inside the tar file `root`."""

    kind = "tar"

    def files(self) -> dict[str, int]:
        return sizes_of(self.root.parent, [self.root.name])

    def entries(self, after: Entry | None = None) -> Iterator[Entry]:
        return behind(self._entries(after), after)

    def _entries(self, after: Entry | None) -> Iterator[Entry]:
        """Yield all images, except those of inner tars before the one that `after` is in."""
        self.left_out.clear()
        inner, classes, around = self._contents()
        numbers = {name: number for number, name in enumerate(classes)}
        name = self.root.name
        with open(self.root, "rb") as file:
            at = [after is not None and one.start <= after.offset < one.end for one in inner]
            for one in inner[at.index(True) if True in at else 0 :]:
                found = [
                    Entry(f"{one.folder}/{path}", size, numbers[one.folder], name, offset)
                    for path, size, offset in self._inside(file, one, self.left_out)
                ]
                yield from sorted(found)
            takes = self.choice.takes
            for path, size, offset in pictures(file, self.root, 0, None, self.left_out, takes):
                # A name that leads out of the archive is in none of its folders.
                if size == UNSAFE or path.startswith(around):
                    path = path.removeprefix(around)
                    yield Entry(path, size, label_of(path, numbers), name, offset)

    def _inside(
        self, file: BinaryIO, inner: _Inner, left_out: Counter[str]
    ) -> Iterator[tuple[str, int, int]]:
        """Yield the chosen images of an inner tar; patterns name it with or without .tar."""
        names = inner.path, os.path.splitext(inner.path)[0]
        return pictures(
            file, self.root, inner.start, inner.end, left_out,
            lambda path: self.choice.takes(*(f"{one}/{path}" for one in names)),
        )  # fmt: skip

    def classes(self, highest: int) -> list[str]:
        return self._contents()[1]

    def find(self, entry: Entry) -> bytes:
        return read_member(self.root.parent, entry)

    def _contents(self) -> tuple[list[_Inner], list[str], str]:
        """Return the inner tars, the classes, and the path around the classes.

        Tars and classes are sorted. A folder counts if there is an image below it. If the user made
        a choice, an inner tar counts only if an image in it is chosen. The path around them ends
        with a slash, or is empty.
        """
        inner, folders = [], set()
        with open(self.root, "rb") as file:
            for member in members(file, self.root):
                path = clean_name(member.name)
                if path is None or is_hidden(path) or member.isdir():
                    continue
                stem, suffix = os.path.splitext(path)
                if suffix.lower() == ".tar" and member.isreg():
                    start = member.offset_data
                    inner.append(_Inner(os.path.basename(stem), start, start + member.size, path))
                elif suffix.lower() in EXTENSIONS and self.choice.takes(path):
                    folders.add(_folder_of(path))
            if self.choice.record():
                inner = [one for one in inner if any(self._inside(file, one, Counter()))]
        around_inner = {_folder_of(one.path) for one in inner}
        split = _split_in(folders | around_inner, self.choice)
        folders, around_inner = (
            {folder for folder in some if f"{folder}/".startswith(split)}
            for some in (folders, around_inner)
        )
        inner = [one for one in inner if one.path.startswith(split)]
        around = "" if inner else _around(folders)
        around = around if around.startswith(split) else split
        classes = _tops(folders, around)
        choice = self.choice.below(around[:-1]) if around else self.choice
        check_splits(self.root, sorted(classes | around_inner), choice, whole=True)
        classes |= {one.folder for one in inner}
        return sorted(inner), sorted(classes - {""}), around


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def _tops(folders: set[str], around: str) -> set[str]:
    """Return the folders directly inside the path around all; "" if it is one of them itself."""
    return {f"{folder}/".removeprefix(around).partition("/")[0] for folder in folders}


def _split_in(folders: set[str], choice: Choice) -> str:
    """Return the path of the folder that --split means, among folders of chosen images.

    It ends with a slash, or is empty.
    """
    around = _around(folders)
    tops = _tops(folders, around)
    if len(tops) < 2 or choice.takes(around[:-1]):
        return ""
    split = choice.split_among(tops)
    return f"{around}{split}/" if split else ""


def _around(folders: set[str]) -> str:
    """Return the path that all folders of images share, above any that holds images itself."""
    if not folders:
        return ""
    common = os.path.commonpath(folders) if all(folders) else ""
    if common in folders:
        common = _folder_of(common)
    return f"{common}/" if common else ""


def pictures(
    file: BinaryIO, path: Path, start: int, end: int | None, left_out: Counter[str],
    takes: Callable[[str], bool],
) -> Iterator[tuple[str, int, int]]:  # fmt: skip
    """Yield (path, size, offset of the data) of a tar's images, in its order; as `members`.

    Args:
        left_out: counts images that are not read.
        takes: whether a path is chosen.
    """
    for member, size, offset in places(file, path, start, end):
        name = clean_name(member.name)
        text = shown(member.name) if name is None else name
        if is_hidden(text) or not takes(text):
            continue
        suffix = os.path.splitext(text)[1].lower()
        if suffix in EXTENSIONS:
            yield text, size, offset
        elif suffix in UNREADABLE:
            left_out[UNREADABLE[suffix]] += 1
        elif text.lower().endswith(COMPRESSED):
            left_out["compressed tars (decompress them to plain .tar)"] += 1
