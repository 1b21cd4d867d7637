"""WebDataset shards: .tar files in which consecutive members with the same key form a sample.

    000017.jpg  000017.cls      image and class number of the sample 000017

Shards are taken in the order of their names, samples in the order of the shard. Indexing reads only
headers and `.cls` members. A sample without an image is left out, and one without `.cls` has no
class. The key ends at the first dot of a name and the rest is the extension, so `a.v2.jpg` is the
image `v2.jpg` of the sample `a`; such an image counts only if the sample has no plain one. If there
are several, the first one counts. What is passed over is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

from .archive import is_hidden, places, read_member
from .base import NO_CLASS, Entry, Source, behind, files_from, labelled, sizes_of
from .folder import EXTENSIONS, UNREADABLE, shown

# A class number takes a few digits; a longer member is something else.
_MAX_CLS = 64


@dataclass
class WebDatasetSource(Source):
    """Samples of the shards `names` in the folder `root`."""

    names: tuple[str, ...]
    kind = "webdataset"

    def files(self) -> dict[str, int]:
        return sizes_of(self.root, list(self.names))

    def entries(self, after: Entry | None = None) -> Iterator[Entry]:
        self.left_out.clear()
        return behind(self._entries(files_from(self.names, after)), after)

    def _entries(self, names: Sequence[str]) -> Iterator[Entry]:
        for name in names:
            path = self.root / name
            with open(path, "rb") as file:
                for key, parts in groupby(_parts(file, path), key=lambda part: part[0]):
                    if entry := self._entry(name, key, [part[1:] for part in parts]):
                        yield entry

    def _entry(self, name: str, key: str, parts: list[_Part]) -> Entry | None:
        plain = [part for part in parts if part[0] in EXTENSIONS]
        kinds = [f".{part[0].rpartition('.')[2]}" for part in parts]
        found = plain or [
            part for part, kind in zip(parts, kinds, strict=True) if kind in EXTENSIONS
        ]
        if not found:
            unreadable = next((UNREADABLE[kind] for kind in kinds if kind in UNREADABLE), None)
            self.left_out[unreadable or "samples without a picture"] += 1
            return None
        if len(found) > 1:
            self.left_out["pictures of samples that have another one before"] += len(found) - 1
        extension, size, offset, _ = found[0]
        labels = [part[3] for part in parts if part[0] == ".cls"]
        size, label = labelled(size, labels[0] if labels else NO_CLASS)
        return Entry(f"{name}/{key}{extension}", size, label, name, offset)

    def find(self, entry: Entry) -> bytes:
        return read_member(self.root, entry)


# (extension, size or why there is none, offset, number in a .cls or None) of one member
_Part = tuple[str, int, int, int | None]


def _parts(file: BinaryIO, path: Path) -> Iterator[tuple[str, str, int, int, int | None]]:
    """Yield (key, then a _Part) of every member; the key ends at the file name's first dot."""
    for member, size, offset in places(file, path):
        name = shown(member.name)
        if is_hidden(name.removeprefix("./")):
            continue
        folder, slash, base = name.removeprefix("./").rpartition("/")
        stem, dot, extension = base.partition(".")
        extension = dot + extension.lower()
        label = None
        if extension == ".cls":
            label = _label(file, offset, max(size, 0))
        yield folder + slash + stem, extension, size, offset, label


def _label(file: BinaryIO, offset: int, size: int) -> int | None:
    # The archive is being listed, which seeks before each header, so this may move the position.
    file.seek(offset)
    try:
        return int(file.read(min(size, _MAX_CLS)))
    except ValueError:
        return None
