"""Files on a disk that exist whole or not at all.

A file is written under a temporary name next to its final one, flushed to the disk, and renamed. A
reader never sees half a file, and a process may die at any moment: what it leaves behind has a name
by which a later run recognises and removes it (`vfmtok_fast.temporary`).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ...temporary import temporary_name
from .errors import writes


@contextlib.contextmanager
def atomic_file(path: Path, *, first: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only if the block ends without an error.

    Args:
        path: the file's final path; its folder must exist.
        first: keep a file that another process has put there meanwhile, and drop this one.

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
            if not (first and _linked(temporary, path)):
                os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        # Also after Ctrl-C. If this fails too, the next run's sweep removes the file.
        with contextlib.suppress(OSError):
            temporary.unlink()


def _linked(temporary: Path, path: Path) -> bool:
    """Link a file to its name unless the name is taken; False if hard links are not supported."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass  # Another process was first; its file stays.
    except OSError:
        return False
    return True


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
