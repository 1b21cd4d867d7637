"""Files on a disk that exist whole or not at all.

A file is written under a temporary name next to its final one, flushed to the disk, and renamed. A
reader never sees half a file, and a process may die at any moment: it leaves behind a
`*.tmp-<machine>-<pid>-<random>` that a later run removes. Process ids are unique only within a PID
namespace, so <machine> names both the host and the namespace.
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

# A temporary file counts as abandoned after this many seconds, also if another machine wrote it.
# Writing one takes seconds; a day allows for clocks that disagree and for stalled network disks.
FOREIGN_TMP_SECONDS = 24 * 3600

# Longest file name, in bytes.
LONGEST_NAME = 255

# The random part is optional because older versions did not write it.
_TMP_NAME = re.compile(r"\.tmp-(?P<machine>[^/]+?)-(?P<pid>\d+)(-[0-9a-f]{8})?$")


def temporary_name(path: Path) -> Path:
    """Return a name next to ``path`` that no other process or thread writes under."""
    unique = f".tmp-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    stem = os.fsencode(path.name)[: max(0, LONGEST_NAME - len(unique))].decode(errors="ignore")
    return path.with_name(stem + unique)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only if the block ends without an error.

    Args:
        path: the file's final path; its folder must exist.

    Raises:
        CacheWriteError: the file could not be written. Nothing is left behind, and an earlier file
            of that name is still there.
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
        # Also after Ctrl-C. If this fails too, the next run's sweep removes the file.
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename survives a power cut."""
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
    """Return whether a file name is one that `atomic_file` writes under."""
    return _TMP_NAME.search(name) is not None


def sweep(folder: Path) -> int:
    """Remove temporary files whose writers are gone; leave those of running ones alone.

    A writer on this machine is gone if its process id is. A file that has not been modified for a
    day counts as abandoned on any machine.

    Args:
        folder: the folder to look in (not below it); it may be missing.

    Returns:
        The number of files removed.
    """
    if not folder.is_dir():
        return 0
    removed = 0
    for entry in list(os.scandir(folder)):
        match = _TMP_NAME.search(entry.name)
        if match is None or not entry.is_file(follow_symlinks=False):
            continue
        with contextlib.suppress(OSError):  # its writer or another sweep was faster
            age = time.time() - entry.stat(follow_symlinks=False).st_mtime
            here = match["machine"] == _machine()
            if (here and not _alive(int(match["pid"]))) or age > FOREIGN_TMP_SECONDS:
                os.unlink(entry.path)
                removed += 1
    return removed


def _machine() -> str:
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux: the host is one namespace
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
