"""A folder of class folders: the layout of torchvision's ImageFolder.

The folders directly under the root are the classes, numbered in sorted order (an empty one keeps
its number), and a class folder is searched to any depth. Images directly in the root have no class:
label -1. Names that start with a dot are skipped (.DS_Store, ._copies, .git). Links are followed,
except into a folder that contains them. Order: by relative POSIX path, as sorted() orders the
strings.

Only the names in the folders that are open at a time are in memory, so indexing a million images
takes little of it.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ...images import HEIF_SUFFIXES, HOW_TO_READ_HEIF, reads_heif
from ..format.shards import BAD, GONE
from .base import NO_CLASS, NO_SIZE, NOT_UTF8, REASONS, BadImage, Entry, Source
from .choice import EVERYTHING, Choice

_PLAIN = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .jp2 .j2k .avif"
    " .mpo".split()
)
EXTENSIONS = _PLAIN | HEIF_SUFFIXES if reads_heif() else _PLAIN
# Images that are not read: they are passed over, and counted.
UNREADABLE = {
    suffix: f"{suffix} files"
    for suffix in ".jxl .psd .tga .exr .hdr .svg .dng .cr2 .cr3 .nef .arw .orf .rw2 .raf".split()
}
UNREADABLE |= {s: f"{s} files ({HOW_TO_READ_HEIF})" for s in HEIF_SUFFIXES - EXTENSIONS}

# What systems and their tools leave in folders and archives: never a class, never an image.
_JUNK = frozenset(
    "__macosx|lost+found|@eadir|#recycle|@recycle|$recycle.bin|system volume information|"
    "thumbs.db|desktop.ini|ehthumbs.db|__pycache__".split("|")
)

# Errors of a single file. Any other OSError (too many open files, stale network mount) concerns the
# machine and ends the run, because quarantining an image for it would make it permanent.
_ERRORS_OF_A_FILE = frozenset(
    {errno.EACCES, errno.EPERM, errno.ELOOP, errno.EIO, errno.EISDIR, errno.ENAMETOOLONG}
)
_NOT_THERE = frozenset({errno.ENOENT, errno.ENOTDIR})


class FolderSource(Source):
    """Images as files below `root`; changes are found image by image."""

    kind = "folder"

    def entries(self, after: Entry | None = None) -> Iterator[Entry]:
        self.left_out.clear()
        numbers = {name: number for number, name in enumerate(self.classes(-1))}
        for path, size in walk(
            self.root, after.path if after else "", self.choice, EXTENSIONS, self.left_out
        ):
            yield Entry(path, size, label_of(path, numbers))

    def classes(self, highest: int) -> list[str]:
        return class_folders(self.root, self.choice)

    def find(self, entry: Entry) -> bytes:
        path = self.root / entry.path
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise BadImage(GONE, "no longer a regular file")
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            # A whole class, or all of them: more likely a disk that is not mounted.
            top = path.parents[entry.path.count("/") - 1] if "/" in entry.path else self.root
            if not top.is_dir():
                raise FileNotFoundError(
                    f"{top}: this folder has disappeared since it was indexed; "
                    "restore it and run again (finished shards are kept)"
                ) from error
            if entry.size == NO_SIZE:
                raise BadImage(BAD, "a link to a file that does not exist") from error
            raise BadImage(GONE, "gone since it was indexed") from error
        except OSError as error:
            if error.errno not in _ERRORS_OF_A_FILE:
                raise
            raise BadImage(BAD, f"cannot be opened: {error.strerror}") from error


def class_folders(root: Path, choice: Choice = EVERYTHING) -> list[str]:
    """Return the sorted names of the class folders under `root`; a label is a position in it."""
    names, odd = names_in(os.fspath(root))
    folders = sorted(name[:-1] for name in names if name.endswith("/"))
    if choice.record():
        # One walk per folder: a single walk would go on through all others if one holds nothing.
        inside = ((name, walk(root, choice=choice, listed=([f"{name}/"], odd))) for name in folders)
        return [name for name, found in inside if next(found, None) is not None]
    return folders


def walk(
    root: Path, after: str = "", choice: Choice = EVERYTHING,
    extensions: frozenset[str] = EXTENSIONS, left_out: Counter[str] | None = None,
    listed: tuple[list[str], dict[str, str]] | None = None,
) -> Iterator[tuple[str, int]]:  # fmt: skip
    """List the images under `root` in index order.

    Args:
        root: an existing folder.
        after: a relative path; what comes before it is skipped without being examined.
        choice: which of the images to list.
        extensions: extensions of the files to list.
        left_out: counts images of formats that are not read.
        listed: which names of the root to walk through, as `names_in` returns them; None: all.

    Yields:
        (relative POSIX path, size in bytes); instead of the size NO_SIZE or NOT_UTF8 if a file
        cannot be examined or its name cannot be written.

    Raises:
        ValueError: a folder cannot be listed.
    """
    top = os.fspath(root)
    # Per open folder: its names (last first), its path, its shown relative path, and its identity,
    # by which a link back to a folder above is noticed.
    stack = [(listed or names_in(top), top, "", identity(top))]
    while stack:
        (names, odd), folder, shown_folder, _ = stack[-1]
        if not names:
            stack.pop()
            continue
        name = names.pop()
        path, shown = os.path.join(folder, odd.get(name, name)), shown_folder + name
        if shown <= after and not (name.endswith("/") and after.startswith(shown)):
            continue
        if choice.leaves_out(shown.rstrip("/")):
            continue
        if name.endswith("/"):
            place = identity(path)
            if place is not None and all(place != above[3] for above in stack):
                stack.append((names_in(path), path, shown, place))
            continue
        suffix = os.path.splitext(name)[1].lower()
        if not choice.takes(shown):
            continue
        if suffix in UNREADABLE and left_out is not None:
            left_out[UNREADABLE[suffix]] += 1
        if suffix in extensions:
            try:
                status = os.stat(path)
            except OSError as error:
                if error.errno not in _ERRORS_OF_A_FILE | _NOT_THERE:
                    raise ValueError(f"{path}: cannot be examined: {error.strerror}") from error
                yield shown, NO_SIZE
                continue
            if stat.S_ISREG(status.st_mode):  # a pipe or a device would block or never end
                is_utf8 = path[len(top) :].lstrip("/") == shown
                yield shown, status.st_size if is_utf8 else NOT_UTF8


def label_of(path: str, numbers: dict[str, int]) -> int:
    """Return the number of the class that a relative path is in; NO_CLASS if it is in none."""
    folder, slash, _ = path.partition("/")
    return numbers.get(folder, NO_CLASS) if slash else NO_CLASS


def is_junk(name: str) -> bool:
    """Return whether a name is hidden, or one that systems create and users do not."""
    return name.startswith(".") or name.lower() in _JUNK


def names_in(folder: str) -> tuple[list[str], dict[str, str]]:
    """Return the shown names in a folder in reverse order, and the names on disk that differ.

    A folder's shown name ends with a slash; with it, sorting each folder by itself gives the order
    of the whole paths ("a-b/x" comes before "a/x"). There is one string per name, because a folder
    may hold a million.
    """
    names, odd = [], {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_junk(entry.name):
                    continue
                name = shown(entry.name)
                if _is_folder(entry):
                    name += "/"
                if name.rstrip("/") != entry.name:
                    odd[name] = entry.name
                names.append(name)
    except FileNotFoundError:
        pass  # it disappeared while its parent was walked
    except OSError as error:
        raise ValueError(
            f"{shown(folder).rstrip('/')}: cannot list this folder: {error.strerror}"
        ) from error
    names.sort(reverse=True)
    return names, odd


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno not in _ERRORS_OF_A_FILE | _NOT_THERE:  # such as a link to itself
            raise
        return False


def shown(name: str) -> str:
    """Return a name as text: bytes that are not UTF-8 become \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def check_utf8(path: str | os.PathLike) -> None:
    """Require a name that can be stored as text, and passed to the libraries that read archives.

    Raises:
        ValueError: it holds bytes that are not UTF-8.
    """
    text = os.fspath(path)
    if shown(text) != text:
        raise ValueError(f"{shown(text)}: {REASONS[NOT_UTF8]}")


def identity(folder: str) -> tuple[int, int] | None:
    """Return what identifies a folder however it is reached; None if it is gone.

    Raises:
        ValueError: it may be there, but cannot be examined.
    """
    try:
        status = os.stat(folder)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise ValueError(
            f"{shown(folder).rstrip('/')}: cannot list this folder: {error.strerror}"
        ) from error
    return status.st_dev, status.st_ino
