"""One picture of an input, as the index holds it."""

from __future__ import annotations

from typing import NamedTuple

NO_CLASS = -1


class Entry(NamedTuple):
    """One picture of an input.

    `path` is unique and relative ("n01440764/n01440764_10026.JPEG", "train-0001.tar/000017.jpg");
    `size` is in bytes, or one of the negative numbers of `sources.base`; `label` is the class's
    number, or -1. Where pictures lie inside larger files, `file` is that file's name relative to
    the input and `offset` the place in it: of a tar the data's first byte, of Parquet the row, of
    LMDB the key. `sha256` is the hash of the picture's bytes, or empty.
    """

    path: str
    size: int
    label: int
    file: str = ""
    offset: int = 0
    sha256: bytes = b""
