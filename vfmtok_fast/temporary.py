"""Temporary names of files and folders that are being written, and removal of abandoned ones.

A file or folder gets its final name only when it is complete. Until then it is called
`*.tmp-<machine>-<pid>-<random>`, so that a later run can tell whether its writer is gone. Process
ids are unique only within a PID namespace, so <machine> names both the host and the namespace.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path

# A temporary file counts as abandoned after this many seconds, also if another machine wrote it.
# Writing one takes seconds; a day allows for clocks that disagree and for stalled network disks.
FOREIGN_TMP_SECONDS = 24 * 3600

# Longest file name, in bytes.
LONGEST_NAME = 255

# The random part is optional because older versions did not write it.
_TMP_NAME = re.compile(r"\.tmp-(?P<machine>[^/]+?)-(?P<pid>\d+)(?P<random>-[0-9a-f]{8})?$")


def temporary_name(path: Path) -> Path:
    """Return a name next to ``path`` that no other process or thread writes under."""
    unique = f".tmp-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    stem = os.fsencode(path.name)[: max(0, LONGEST_NAME - len(unique))].decode(errors="ignore")
    return path.with_name(stem + unique)


def is_temporary(name: str) -> bool:
    """Whether a name is one that `temporary_name` makes."""
    return _TMP_NAME.search(name) is not None


def sweep(folder: Path, of: str = "") -> int:
    """Remove temporary files and folders whose writers are gone; leave those of running ones alone.

    A writer on this machine is gone if its process id is. A file or folder in which nothing has
    been modified for a day counts as abandoned on any machine.

    Args:
        folder: the folder to look in (not below it); it may be missing.
        of: remove only what was to get this name; empty: all.

    Returns:
        The number of files and folders removed.
    """
    if not folder.is_dir():
        return 0
    removed = 0
    for entry in list(os.scandir(folder)):
        match = _TMP_NAME.search(entry.name)
        if match is None or not entry.name.startswith(f"{of}.tmp-" if of else ""):
            continue
        # A folder's name must have the random part, so that no other program's folder is removed.
        if not (entry.is_file(follow_symlinks=False) or match["random"] and not entry.is_symlink()):
            continue
        with contextlib.suppress(OSError):  # its writer or another sweep was faster
            path = Path(entry.path)
            age = time.time() - _touched(path)
            here = match["machine"] == _machine()
            if (here and not _alive(int(match["pid"]))) or age > FOREIGN_TMP_SECONDS:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed += 1
    return removed


def _touched(path: Path) -> float:
    """The time at which a file, or anything in a folder, was last modified."""
    inside = path.rglob("*") if path.is_dir() else ()
    return max(one.lstat().st_mtime for one in (path, *inside))


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
