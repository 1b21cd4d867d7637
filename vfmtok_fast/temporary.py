"""Names of files and folders that are being written, and removing what the dead left.

What is written gets its own name only at the end. Until then it is called
`*.tmp-<machine>-<pid>-<random>`, so that a later run knows whether its writer is gone. Process ids
count within a PID namespace, so a machine's name here is that of the host and of the namespace.
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

# A temporary file of another machine is taken for abandoned after this many seconds. Writing one
# takes seconds; a day leaves room for clocks that disagree and for stalled network disks.
FOREIGN_TMP_SECONDS = 24 * 3600

# Bytes of a file's name.
LONGEST_NAME = 255

# The random part is younger than the rest: files of older versions have none.
_TMP_NAME = re.compile(r"\.tmp-(?P<machine>[^/]+?)-(?P<pid>\d+)(?P<random>-[0-9a-f]{8})?$")


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that nobody else writes under, be it a thread of this process."""
    unique = f".tmp-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    stem = os.fsencode(path.name)[: max(0, LONGEST_NAME - len(unique))].decode(errors="ignore")
    return path.with_name(stem + unique)


def is_temporary(name: str) -> bool:
    """Whether a name is one of `temporary_name`."""
    return _TMP_NAME.search(name) is not None


def sweep(folder: Path, of: str = "") -> int:
    """Remove the temporary files and folders of processes that are gone, not of living ones.

    On this machine a writer is gone when its process id is; on another one, when nothing of what it
    writes has been touched for a day.

    Args:
        folder: the folder to look in (not below it); it may be missing.
        of: remove only what was to get this name; empty: all.

    Returns:
        How many were removed.
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
        with contextlib.suppress(OSError):  # its own writer or another sweep was faster
            age = time.time() - _touched(Path(entry.path))
            here = match["machine"] == _machine()
            if (here and not _alive(int(match["pid"]))) or age > FOREIGN_TMP_SECONDS:
                _remove(Path(entry.path))
                removed += 1
    return removed


def _touched(path: Path) -> float:
    """When a file, or anything in a folder, was last written."""
    inside = path.rglob("*") if path.is_dir() else ()
    return max(one.lstat().st_mtime for one in (path, *inside))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


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
