"""Files that are there whole or not at all.

Every file of a token cache is written under a temporary name beside its place, flushed to the
disk, and renamed. A reader never sees half a file, and a process may die at any moment: what it
leaves behind is a `*.tmp-<host>-<pid>` that a later run sweeps away. In a store that is reached by
a URL a file is put in one piece under its own name instead; `store` says why that is enough.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .store import Place, StoreError, UrlPath

# A temporary file of another machine is taken for abandoned after this many seconds. Writing one
# takes seconds; a day leaves room for clocks that disagree and for stalled network disks.
FOREIGN_TMP_SECONDS = 24 * 3600

_TMP_NAME = re.compile(r"\.tmp-(?P<host>[^/]+)-(?P<pid>\d+)$")

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on a disk that can be written",
}


class CacheWriteError(OSError):
    """A file of the cache could not be written: disk full, read-only folder and the like."""

    def __init__(self, path: str | Place, error: OSError) -> None:
        advice = _ADVICE.get(error.errno, "check the folder and its disk")
        advice = "check the store" if isinstance(path, UrlPath) else advice
        reason = error.reason if isinstance(error, StoreError) else error.strerror or error
        super().__init__(f"cannot write {path}: {reason}; {advice} and run again")
        self.errno = error.errno
        self._made_of = path, error

    def __reduce__(self) -> tuple:
        # As it would be by itself, it could not be sent from one process to another.
        return type(self), self._made_of


@contextlib.contextmanager
def atomic_file(path: Place) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when the block ends well.

    Args:
        path: where the file shall be; its folder must exist.

    Raises:
        CacheWriteError: the file could not be written. Nothing is left behind, and whatever had
            the name before is still there.
    """
    if isinstance(path, UrlPath):
        with _spooled(path) as file:
            yield file
        return
    temporary = path.with_name(f"{path.name}.tmp-{socket.gethostname()}-{os.getpid()}")
    done = False
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        done = True
        sync_folder(path.parent)
    except OSError as error:
        raise CacheWriteError(path, error) from error
    finally:
        # Also after Ctrl-C. Where even this fails, the next run's sweep does it.
        if not done:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def _spooled(path: UrlPath) -> Iterator[BinaryIO]:
    """A local file that is put into the store only when the block ends well."""
    try:
        with tempfile.NamedTemporaryFile(prefix="vfmtok-") as file:
            yield file
            file.flush()
            path.upload(file.name)
    except OSError as error:
        raise CacheWriteError(path, error) from error


def write_atomic(path: Place, data: bytes) -> None:
    """Write `data` to `path` whole or not at all; see `atomic_file`."""
    if isinstance(path, UrlPath):
        try:
            path.write_bytes(data)
        except OSError as error:
            raise CacheWriteError(path, error) from error
        return
    with atomic_file(path) as file:
        file.write(data)


def make_folder(path: Place) -> None:
    """Create a folder and its parents if they are missing; a store has no folders.

    Raises:
        CacheWriteError: it cannot be created.
    """
    if isinstance(path, UrlPath):
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheWriteError(path, error) from error


def replace_file(source: Place, target: Place) -> None:
    """Give a file another's name; in a store, by putting it again. May be done again and again.

    Raises:
        CacheWriteError: it cannot be done.
    """
    try:
        if isinstance(source, UrlPath):
            target.write_bytes(source.read_bytes())
            source.remove()
            return
        os.replace(source, target)
        sync_folder(target.parent)
    except FileNotFoundError:
        return  # another process has done it
    except OSError as error:
        raise CacheWriteError(target, error) from error


def remove_folder(path: Place) -> None:
    """Remove an empty folder if it is there; one that is not empty stays."""
    if not isinstance(path, UrlPath):
        with contextlib.suppress(OSError):
            path.rmdir()


def remove_file(path: Place) -> None:
    """Remove a file if it is there, for good (also after a power cut).

    Raises:
        CacheWriteError: it is there and cannot be removed.
    """
    try:
        if isinstance(path, UrlPath):
            path.remove()
            return
        path.unlink()
        sync_folder(path.parent)
    except FileNotFoundError:
        return
    except OSError as error:
        raise CacheWriteError(path, error) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot flush a folder; the rename itself has happened.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def is_temporary(name: str) -> bool:
    """Whether a file name is one that `atomic_file` writes under."""
    return _TMP_NAME.search(name) is not None


def sweep(folder: Place) -> int:
    """Remove the temporary files of processes that are gone; leave those of living ones alone.

    On this machine a writer is gone when its process id is; on another one, when its file has not
    been touched for a day.

    Args:
        folder: the folder to look in (not below it); it may be missing, or in a store, where there
            are no such files.

    Returns:
        How many files were removed.
    """
    if isinstance(folder, UrlPath) or not folder.is_dir():
        return 0
    removed = 0
    for entry in list(os.scandir(folder)):
        match = _TMP_NAME.search(entry.name)
        if match is None or not entry.is_file(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):  # its own writer or another sweep was faster
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            here = match["host"] == socket.gethostname()
            if (here and not _alive(int(match["pid"]))) or age > FOREIGN_TMP_SECONDS:
                os.unlink(entry.path)
                removed += 1
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
