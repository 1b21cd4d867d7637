"""What every kind of input has in common: entries, and why an entry cannot be read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..format.index import NO_CLASS, Entry
from ..format.shards import BAD, GONE
from .choice import Choice

# Sizes that are no sizes. Such an entry keeps its place in the index.
NO_SIZE = -1  # could not be examined: a link to nowhere, a link to itself
NOT_UTF8 = -2  # its path cannot be written in the index; invalid bytes are shown as \xNN
UNSAFE = -3  # an archive member whose name would lead out of the archive
BAD_LABEL = -4  # its label is no class number
DAMAGED = -5  # its record in a database cannot be read
UNKNOWN = -6  # fine, but its size is known only when it is read
NOT_A_FILE = -7  # a link or a device in an archive

# Why entries of these sizes are quarantined without looking at them again.
REASONS = {
    NOT_UTF8: "its name is not UTF-8; rename it",
    UNSAFE: "its name is absolute or holds '..', which no archive of pictures needs",
    BAD_LABEL: "its label is not a class number of 0 to 999999",
    DAMAGED: "its record is missing or damaged",
    NOT_A_FILE: "not a regular file in the archive",
}
# The classes are written down one by one, so a label cannot be any number.
MAX_LABEL = 999_999


class BadImage(Exception):
    """One picture cannot be read; the run goes on. `status` is that of the shard's row."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class LeftOutWarning(UserWarning):
    """Something in an input was passed over that somebody may have meant to be a picture."""


class Source(Protocol):
    """An input: lists its pictures in an order that never changes, and reads them one by one."""

    kind: str
    root: Path
    choice: Choice
    # What the last listing passed over, and how often: "samples without a picture".
    left_out: Mapping[str, int]

    @property
    def chosen(self) -> dict[str, Any]:
        """What of it is taken, as far as the user or the files had to say: plain JSON values.

        An index keeps them; empty where everything is taken as it always was.
        """
        return self.choice.record()

    @property
    def shown(self) -> Path:
        """What to call it: its only archive, where that is one of a folder's, or its root."""
        files = self.files() or {}
        return (
            self.root / next(iter(files)) if len(files) == 1 and self.root.is_dir() else self.root
        )

    def files(self) -> dict[str, int] | None:
        """Size in bytes of every file that holds pictures; None where each picture is a file."""

    def entries(self, after: Entry | None = None) -> Iterator[Entry]:
        """The pictures in index order, streamed, from behind one on.

        ValueError where the input itself is damaged.
        """

    def classes(self, highest: int) -> list[str]:
        """Names of the classes, given the highest label in use (-1: none); they may be numbers."""
        return [str(number) for number in range(highest + 1)]

    def read(self, entry: Entry) -> bytes:
        """A picture's bytes; BadImage where that picture cannot be read, OSError if nothing can."""
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

    def find(self, entry: Entry) -> bytes:
        """For `read`: the bytes that are there now, be they those that were indexed or not."""


def behind(entries: Iterator[Entry], after: Entry | None) -> Iterator[Entry]:
    """Those of some entries that follow one of them; all for None.

    An archive may hold a name twice, so that the place counts too.

    Raises:
        ValueError: that one is not among them.
    """
    if after is not None:
        place = after.path, after.file, after.offset
        if all((entry.path, entry.file, entry.offset) != place for entry in entries):
            raise ValueError(
                f"{after.path!r} was listed when indexing was interrupted, and is not any more; "
                "cache into a new folder"
            )
    yield from entries


def files_from(names: Sequence[str], after: Entry | None) -> Sequence[str]:
    """Those of an input's files that an entry or what follows it can lie in; all for None."""
    return names if after is None else names[names.index(after.file) :]


def check_label(label: object) -> int | None:
    """A class number as it is, any negative one as NO_CLASS, None for what is no class number."""
    if isinstance(label, bool) or not isinstance(label, int) or label > MAX_LABEL:
        return None
    return max(label, NO_CLASS)


def sizes_of(root: Path, names: list[str]) -> dict[str, int]:
    """Size of each file of an input.

    Raises:
        FileNotFoundError: one of them has gone.
    """
    sizes = {}
    for name in names:
        path = root / name
        try:
            sizes[name] = path.stat().st_size
        except OSError as error:
            raise FileNotFoundError(f"{path}: cannot be read: {error.strerror}") from error
    return sizes
