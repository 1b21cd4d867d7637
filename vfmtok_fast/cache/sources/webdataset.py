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
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

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
                for _, parts in groupby(_parts(file, path), key=attrgetter("key")):
                    if entry := self._entry(name, list(parts)):
                        yield entry

    def _entry(self, name: str, parts: list[_Part]) -> Entry | None:
        found = [part for part in parts if part.extension in EXTENSIONS]
        found = found or [part for part in parts if part.suffix in EXTENSIONS]
        if not found:
            unreadable = [UNREADABLE[part.suffix] for part in parts if part.suffix in UNREADABLE]
            self.left_out[unreadable[0] if unreadable else "samples without a picture"] += 1
            return None
        if len(found) > 1:
            self.left_out["pictures of samples that have another one before"] += len(found) - 1
        picture = found[0]
        labels = [part.number for part in parts if part.extension == ".cls"]
        size, label = labelled(picture.size, labels[0] if labels else NO_CLASS)
        path = f"{name}/{picture.key}{picture.extension}"
        return Entry(path, size, label, name, picture.offset)

    def find(self, entry: Entry) -> bytes:
        return read_member(self.root, entry)


class _Part(NamedTuple):
    """One member: `size` may be why there is none, and `number` is what a .cls holds, if it is."""

    key: str
    extension: str
    size: int
    offset: int
    number: int | None

    @property
    def suffix(self) -> str:
        """The last part of the extension."""
        return "." + self.extension.rpartition(".")[2]


def _parts(file: BinaryIO, path: Path) -> Iterator[_Part]:
    """Yield every member; the key ends at the file name's first dot."""
    for member, size, offset in places(file, path):
        name = shown(member.name)
        if is_hidden(name.removeprefix("./")):
            continue
        folder, slash, base = name.removeprefix("./").rpartition("/")
        stem, dot, extension = base.partition(".")
        extension = dot + extension.lower()
        number = _number(file, offset, max(size, 0)) if extension == ".cls" else None
        yield _Part(folder + slash + stem, extension, size, offset, number)


def _number(file: BinaryIO, offset: int, size: int) -> int | None:
    # The archive is being listed, which seeks before each header, so this may move the position.
    file.seek(offset)
    try:
        return int(file.read(min(size, _MAX_CLS)))
    except ValueError:
        return None
