"""WebDataset shards: .tar files in which neighbouring members of one key make a sample.

    000017.jpg  000017.cls      picture and class number of the sample 000017

Shards are taken in the order of their names, samples in the order of the shard. Only headers and
`.cls` members are read to index. A sample without a picture is left out, one without `.cls` has no
class, and of several pictures the first counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

from .base import (
    BAD_LABEL,
    NO_CLASS,
    Entry,
    behind,
    check_label,
    files_from,
    numbered_classes,
    sizes_of,
)
from .choice import EVERYTHING, Choice
from .folder import EXTENSIONS
from .tar import is_hidden, members, read_member, shown, size_of

# A class number takes a few digits; more than this is something else.
_MAX_CLS = 64


@dataclass(frozen=True)
class WebDatasetSource:
    """Samples of the shards `names` in the folder `root`."""

    root: Path
    names: tuple[str, ...]
    choice: Choice = EVERYTHING
    kind = "webdataset"

    @property
    def chosen(self) -> dict[str, Any]:
        """Which shards are taken, where not all are."""
        return self.choice.record()

    def files(self) -> dict[str, int]:
        return sizes_of(self.root, list(self.names))

    def entries(self, after: Entry | None = None) -> Iterator[Entry]:
        return behind(self._entries(files_from(self.names, after)), after)

    def _entries(self, names: Sequence[str]) -> Iterator[Entry]:
        for name in names:
            path = self.root / name
            with open(path, "rb") as file:
                for key, parts in groupby(_parts(file, path), key=lambda part: part[0]):
                    if entry := _entry(name, key, [part[1:] for part in parts]):
                        yield entry

    def classes(self, highest: int) -> list[str]:
        return numbered_classes(highest)

    def read(self, entry: Entry) -> bytes:
        return read_member(self.root, entry)


def is_webdataset(path: Path) -> bool:
    """Whether one of a tar's first members is a `.cls`; False for a damaged one."""
    try:
        with open(path, "rb") as file:
            return any(m.name.endswith(".cls") for m in islice(members(file, path), 64))
    except ValueError:
        return False


# (extension, size or why there is none, offset, class number or None) of one member
_Part = tuple[str, int, int, int | None]


def _parts(file: BinaryIO, path: Path) -> Iterator[tuple[str, str, int, int, int | None]]:
    """(key, then a _Part) of every member; the key ends at the first dot of the file's name."""
    for member in members(file, path):
        name = shown(member.name)
        if member.isdir() or is_hidden(name.removeprefix("./")):
            continue
        folder, slash, base = name.removeprefix("./").rpartition("/")
        stem, dot, extension = base.partition(".")
        extension = dot + extension.lower()
        label = None
        if extension == ".cls":
            label = _label(file, member.offset_data, member.size)
        yield folder + slash + stem, extension, size_of(member), member.offset_data, label


def _label(file: BinaryIO, offset: int, size: int) -> int | None:
    # The archive is being walked: it seeks before each header, so this may move the file.
    file.seek(offset)
    try:
        return check_label(int(file.read(min(size, _MAX_CLS))))
    except ValueError:
        return None


def _entry(name: str, key: str, parts: list[_Part]) -> Entry | None:
    picture = next((part for part in parts if part[0] in EXTENSIONS), None)
    if picture is None:
        return None
    extension, size, offset, _ = picture
    labels = [part[3] for part in parts if part[0] == ".cls"]
    label = labels[0] if labels else NO_CLASS
    if label is None:
        # Only a picture that could be read is given up for its label.
        size, label = (BAD_LABEL if size >= 0 else size), NO_CLASS
    return Entry(f"{name}/{key}{extension}", size, label, name, offset)
