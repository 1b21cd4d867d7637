"""Plain tars in place: list their members, locate the data of each, and read it there.

Listing reads only headers, and no member is ever written anywhere.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

from ...errors import one_line
from ..format.shards import GONE
from .base import NOT_A_FILE, UNSAFE, BadImage, Entry
from .folder import is_junk, shown

BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
# Limits: a longer chain of links is taken to be a cycle, and no file's PAX header is longer.
_MOST_LINKS = 40
_PAX_BLOCKS = 64


def members(
    file: BinaryIO, path: Path, start: int = 0, end: int | None = None
) -> Iterator[tarfile.TarInfo]:
    """List a tar, or one inside another tar, holding one header at a time.

    Concatenated tars (`cat a.tar b.tar`) are listed as one.

    Args:
        file: the outermost tar, opened for reading.
        path: its name, for messages.
        start, end: where the tar to list is in it, in bytes; None: to the end.

    Yields:
        Every member; `offset_data` counts from the start of `file`.

    Raises:
        ValueError: damaged, truncated, compressed or not a tar.
    """
    if end is None:
        end = os.fstat(file.fileno()).st_size
    while start is not None:
        start = yield from _members(file, path, start, end)


def _members(
    file: BinaryIO, path: Path, start: int, end: int
) -> Generator[tarfile.TarInfo, None, int | None]:
    """Yield the members of one archive; return where another one starts after it, or None."""
    file.seek(start)
    try:
        archive = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
        while archive.offset < end and (member := archive.next()) is not None:
            # The size of a sparse file is what it unpacks to. Such a file is not read as an image.
            size = archive.offset - member.offset_data if member.issparse() else member.size
            if member.offset_data + size > end:
                raise tarfile.ReadError(f"member {shown(member.name)!r} is cut short")
            yield member
            archive.members.clear()  # a million headers would be a gigabyte
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as error:
        raise ValueError(
            f"{path}: damaged, truncated or not a plain tar ({one_line(error)})"
        ) from error
    # tarfile treats a damaged header as the end; a real end is a block of zeros.
    file.seek(archive.offset)
    if file.read(BLOCK) != bytes(BLOCK):
        raise ValueError(
            f"{path}: damaged or truncated at byte {archive.offset} (no end of archive there); "
            "download or copy it again"
        )
    return _next_archive(file, archive.offset, end)


def _next_archive(file: BinaryIO, at: int, end: int) -> int | None:
    """Return the offset of the first block that is not all zeros; None if there is none."""
    file.seek(at)
    while chunk := file.read(max(0, min(_CHUNK, end - at))):
        if rest := chunk.lstrip(b"\0"):
            return (at + len(chunk) - len(rest)) // BLOCK * BLOCK
        at += len(chunk)
    return None


def places(
    file: BinaryIO, path: Path, start: int = 0, end: int | None = None
) -> Iterator[tuple[tarfile.TarInfo, int, int]]:
    """Yield (member, size or why there is none, offset of the data) of all but folders.

    A link stands for its target inside the same tar; no other target is ever read. Raises like
    `members`.
    """
    targets = None
    for member in members(file, path, start, end):
        size, offset = size_of(member), member.offset_data
        if size == NOT_A_FILE and (member.islnk() or member.issym()):
            targets = _targets(file, path, start, end) if targets is None else targets
            size, offset = targets.get(clean_name(member.name), (size, offset))
        if not member.isdir():
            yield member, size, offset


def _targets(file: BinaryIO, path: Path, start: int, end: int | None) -> dict[str, tuple[int, int]]:
    """Return size and offset of what the links of a tar lead to; holds only the links' names."""
    links = {}
    for member in members(file, path, start, end):
        name = clean_name(member.name)
        if name is not None and (member.islnk() or member.issym()):
            folder = posixpath.dirname(name) if member.issym() else ""
            links[name] = clean_name(posixpath.normpath(posixpath.join(folder, member.linkname)))
    ends = {}
    for name in links:
        at, steps = name, 0
        while at in links and steps < _MOST_LINKS:
            at, steps = links[at], steps + 1
        ends[name] = at
    wanted, found = set(ends.values()) - {None}, {}
    for member in members(file, path, start, end):
        name = clean_name(member.name)
        if name in wanted and (size := size_of(member)) >= 0:
            found[name] = size, member.offset_data
    return {name: found[at] for name, at in ends.items() if at in found}


def size_of(member: tarfile.TarInfo) -> int:
    """Return a member's size in bytes, or the negative number that says why it is not read."""
    if clean_name(member.name) is None:
        return UNSAFE
    return member.size if member.isreg() and not member.issparse() else NOT_A_FILE


def read_member(root: Path, entry: Entry) -> bytes:
    """Read an image at its offset, after checking the header before it; raises like `read`."""
    path = root / entry.file
    try:
        with open(path, "rb") as file:
            file.seek(entry.offset - BLOCK)
            header, data = file.read(BLOCK), file.read(entry.size)
            size = _size_at(file, entry, header)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{path}: this archive has disappeared since it was indexed; "
            "restore it and run again (finished shards are kept)"
        ) from error
    if size is None:
        raise BadImage(GONE, "changed since it was indexed: no member of the tar here")
    if size != entry.size:
        raise BadImage(
            GONE, f"changed since it was indexed: {entry.size} bytes then, {size} bytes now"
        )
    return data


def _size_at(file: BinaryIO, entry: Entry, header: bytes) -> int | None:
    """Return the size of the member whose header this is; None if it is not a header.

    For large members, or for all of them, the size may be in a PAX header before it instead.
    """
    try:
        size = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size
    except tarfile.HeaderError:
        return None
    blocks = 1
    while size != entry.size and blocks < min(_PAX_BLOCKS, entry.offset // BLOCK - 1):
        blocks += 1
        file.seek(entry.offset - BLOCK * (blocks + 1))
        try:
            before = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
            if before.type == tarfile.XHDTYPE and -(-before.size // BLOCK) == blocks - 1:
                file.seek(entry.offset - BLOCK * (blocks + 1))
                with tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
                    member = archive.next()
                return size if member is None else member.size
        except (tarfile.TarError, ValueError):
            continue  # content of the PAX header, or of the image before
    return size


def clean_name(name: str) -> str | None:
    """Return a member's relative path without "./"; None if it would lead out of the archive."""
    parts = shown(name).split("/")
    if not parts[0] or ".." in parts:
        return None
    return "/".join(part for part in parts if part not in ("", "."))


def is_hidden(path: str) -> bool:
    """Return whether a name on the path is junk, like .DS_Store and the ._copies in __MACOSX."""
    return any(is_junk(part) and part not in (".", "..") for part in path.split("/"))
