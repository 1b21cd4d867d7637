"""Files on a disk that are there whole or not at all.

A file is written under a temporary name beside its place, flushed to the disk, and renamed. A
reader never sees half a file, and a process may die at any moment: what it leaves behind is a
`*.tmp-<machine>-<pid>-<random>` that a later run sweeps away. Process ids count within a PID
namespace, so a machine's name here is that of the host and of the namespace.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import writes

# A temporary file of another machine is taken for abandoned after this many seconds. Writing one
# takes seconds; a day leaves room for clocks that disagree and for stalled network disks.
FOREIGN_TMP_SECONDS = 24 * 3600

# Bytes of a file's name.
LONGEST_NAME = 255

# The random part is younger than the rest: files of older versions have none.
_TMP_NAME = re.compile(r"\.tmp-(?P<machine>[^/]+?)-(?P<pid>\d+)(-[0-9a-f]{8})?$")


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that nobody else writes under, be it a thread of this process."""
    unique = f".tmp-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    stem = os.fsencode(path.name)[: max(0, LONGEST_NAME - len(unique))].decode(errors="ignore")
    return path.with_name(stem + unique)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when the block ends well.

    Args:
        path: where the file shall be; its folder must exist.

    Raises:
        CacheWriteError: the file could not be written. Nothing is left behind, and whatever had
            the name before is still there.
    """
    temporary = temporary_name(path)
    try:
        with writes(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        # Also after Ctrl-C. Where even this fails, the next run's sweep does it.
        with contextlib.suppress(OSError):
            temporary.unlink()


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


def sweep(folder: Path) -> int:
    """Remove the temporary files of processes that are gone; leave those of living ones alone.

    On this machine a writer is gone when its process id is; on another one, when its file has not
    been touched for a day.

    Args:
        folder: the folder to look in (not below it); it may be missing.

    Returns:
        How many files were removed.
    """
    if not folder.is_dir():
        return 0
    removed = 0
    for entry in list(os.scandir(folder)):
        match = _TMP_NAME.search(entry.name)
        if match is None or not entry.is_file(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):  # its own writer or another sweep was faster
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            here = match["machine"] == _machine()
            if (here and not _alive(int(match["pid"]))) or age > FOREIGN_TMP_SECONDS:
                os.unlink(entry.path)
                removed += 1
    return removed


def _machine() -> str:
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # no Linux: a host is one namespace
        return socket.gethostname()
    return f"{socket.gethostname()}.{namespace}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
