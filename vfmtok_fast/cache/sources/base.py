"""What all kinds of input have in common: entries, and why an entry cannot be read."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..format.index import NO_CLASS, Entry
from ..format.shards import BAD, GONE
from .choice import EVERYTHING, Choice

# Stored instead of a size. Such an entry keeps its place in the index.
NO_SIZE = -1  # could not be examined: a dangling link, a link to itself
NOT_UTF8 = -2  # its path cannot be written in the index; invalid bytes are shown as \xNN
UNSAFE = -3  # an archive member whose name would lead out of the archive
BAD_LABEL = -4  # its label is not a class number
DAMAGED = -5  # its record in a database cannot be read
UNKNOWN = -6  # sound, but its size is known only when it is read
NOT_A_FILE = -7  # a link or a device in an archive

# Why entries with these sizes are quarantined without being read.
REASONS = {
    NOT_UTF8: "its name is not UTF-8; rename it",
    UNSAFE: "its name is absolute or holds '..', which no archive of pictures needs",
    BAD_LABEL: "its label is not a class number of 0 to 999999",
    DAMAGED: "its record is missing or damaged",
    NOT_A_FILE: "not a regular file in the archive",
}
# The manifest lists the classes one by one, so labels must have a limit.
MAX_LABEL = 999_999


class BadImage(Exception):
    """An image cannot be read, and the run goes on. `status` is that of the shard's row."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class LeftOutWarning(UserWarning):
    """Something that may have been meant as an image was passed over in an input."""


@dataclass
class Source(ABC):
    """An input: lists its images in an order that never changes, and reads them one by one.

    Args:
        root: the folder or archive, which messages name.
        choice: which of its files are taken.
        left_out: what the last listing passed over, and how often: "samples without a picture".
    """

    kind: ClassVar[str]
    root: Path
    choice: Choice = field(default=EVERYTHING, kw_only=True)
    left_out: Counter[str] = field(default_factory=Counter, kw_only=True, repr=False, compare=False)

    @property
    def chosen(self) -> dict[str, Any]:
        """What was taken from the input, as far as the user or the files say: plain JSON values.

        An index stores it. It is empty if everything is taken as it always was.
        """
        return self.choice.record()

    @property
    def shown(self) -> Path:
        """The name to show: that of the only archive in a folder, or the root."""
        files = list(self.files() or ())
        alone = len(files) == 1 and self.root.is_dir()
        return self.root / files[0] if alone else self.root

    def files(self) -> dict[str, int] | None:
        """Return the size in bytes of each file that holds images; None if each image is a file."""
        return None

    @abstractmethod
    def entries(self, after: Entry | None = None) -> Iterator[Entry]:
        """Yield the images in index order; with `after`, only those that follow it.

        Raises:
            ValueError: the input itself is damaged.
        """

    def classes(self, highest: int) -> list[str]:
        """Return the names of the classes, given the highest label (-1: none), or numbers."""
        return [str(number) for number in range(highest + 1)]

    def read(self, entry: Entry) -> bytes:
        """Return an image's bytes; BadImage if that one cannot be read, OSError if nothing can."""
        if entry.size in REASONS:
            raise BadImage(BAD, REASONS[entry.size])
        data = self.find(entry)
        if entry.size != UNKNOWN and len(data) != entry.size:
            raise BadImage(
                GONE, f"changed since it was indexed: {entry.size} bytes then, {len(data)} now"
            )
        if not data:
            raise BadImage(BAD, "empty file")
        if entry.sha256 and hashlib.sha256(data).digest() != entry.sha256:
            raise BadImage(GONE, "changed since it was indexed: as many bytes, but others")
        return data

    @abstractmethod
    def find(self, entry: Entry) -> bytes:
        """Return the bytes that are there now, which `read` compares with what was indexed."""


def behind(entries: Iterator[Entry], after: Entry | None) -> Iterator[Entry]:
    """Yield the entries that follow a given one; all for None.

    An archive may hold a name twice, so file and offset are compared too.

    Raises:
        ValueError: that entry is not among them.
    """
    if after is not None:
        place = after.path, after.file, after.offset
        if all((entry.path, entry.file, entry.offset) != place for entry in entries):
            raise ValueError(
                f"{after.path!r} was listed before indexing was interrupted, but is missing now; "
                "cache into a new folder"
            )
    yield from entries


def files_from(names: Sequence[str], after: Entry | None) -> Sequence[str]:
    """Return an input's files from the one that holds an entry on; all for None."""
    return names if after is None else names[names.index(after.file) :]


def labelled(size: int, label: object) -> tuple[int, int]:
    """Return an entry's size and label: NO_CLASS for any negative number, or for no class number.

    In the latter case, BAD_LABEL stands for the size of an image that could be read.
    """
    if isinstance(label, bool) or not isinstance(label, int) or label > MAX_LABEL:
        return (size if size in REASONS else BAD_LABEL), NO_CLASS
    return size, max(label, NO_CLASS)


def sizes_of(root: Path, names: list[str]) -> dict[str, int]:
    """Return the size of each file of an input.

    Raises:
        FileNotFoundError: one of them cannot be read.
    """
    try:
        return {name: (root / name).stat().st_size for name in names}
    except OSError as error:
        raise FileNotFoundError(f"{error.filename}: cannot be read: {error.strerror}") from error
