"""What an index holds: the images, in shards, and what they were indexed from."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

NO_CLASS = -1
ORIGIN = b"vfmtok_fast.origin"


class Entry(NamedTuple):
    """One image of an input.

    `path` is relative ("n01440764/n01440764_10026.JPEG", "train-0001.tar/000017.jpg") and unique,
    unless an archive holds a name twice. `size` is in bytes, or one of the negative numbers of
    `sources.base`. `label` is the class number, or -1. If images are stored inside larger files,
    `file` is that file's name relative to the input, and `offset` is the position in it: the first
    byte of the data in a tar, the row in Parquet, the key in LMDB. `sha256` is the hash of the
    image's bytes, or empty.
    """

    path: str
    size: int
    label: int
    file: str = ""
    offset: int = 0
    sha256: bytes = b""


@dataclass(frozen=True)
class Rows:
    """The images of one shard, and the global index of the first one."""

    first: int
    entries: list[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.first + part.indices(len(self))[0], self.entries[part])

    @property
    def paths(self) -> list[str]:
        """Relative path of each image."""
        return [entry.path for entry in self.entries]

    @property
    def labels(self) -> list[int]:
        """Class number of each image, or -1."""
        return [entry.label for entry in self.entries]


@dataclass(frozen=True)
class Origin:
    """What was indexed.

    Args:
        kind: kind of the input.
        files: size of each file that holds images; None for a folder, where each image is a file.
        runs: first row of each later addition; rows up to the next such row are in the input's
            order.
        root: the input's path; set only in parts of an index, which another input must not
            continue.
        chosen: what was taken from the input, see `Source.chosen`.
        hashed: whether the index has a column for the entries' hashes.
    """

    kind: str = "folder"
    files: dict[str, int] | None = None
    runs: tuple[int, ...] = ()
    root: str | None = None
    chosen: dict[str, Any] = field(default_factory=dict)
    hashed: bool = False

    def metadata(self) -> dict[bytes, bytes]:
        """Return the schema metadata of index.parquet; empty for a folder with nothing to add."""
        later = {"runs": self.runs, "root": self.root, "chosen": self.chosen}
        later = {name: value for name, value in later.items() if value}
        if self.files is None and not later:
            return {}
        content = {"kind": self.kind, "files": self.files, **later}
        return {ORIGIN: json.dumps(content, sort_keys=True).encode()}
