"""Errors of reading and writing a cache."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from ...errors import one_line

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on file sizes",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder on a disk that can be written",
}


class StoreError(OSError):
    """A store failed: not reachable, no permission, no such bucket, ..."""

    def __init__(self, url: str, error: Exception) -> None:
        super().__init__(f"{url}: {one_line(error)}")
        self.errno, self.reason = getattr(error, "errno", None), one_line(error)
        self._made_of = url, error

    def __reduce__(self) -> tuple:
        return type(self), self._made_of


class CacheWriteError(OSError):
    """A file of the cache could not be written: disk full, read-only folder and the like."""

    def __init__(self, path: str | os.PathLike, error: OSError) -> None:
        if isinstance(error, StoreError):
            reason, advice = error.reason, "check the store"
        else:
            reason = error.strerror or error
            advice = _ADVICE.get(error.errno, "check the folder and its disk")
        super().__init__(f"cannot write {path}: {reason}; {advice} and run again")
        self.errno = error.errno
        self._made_of = str(path), error

    def __reduce__(self) -> tuple:
        # By default it would be rebuilt from its message alone, which fails in another process.
        return type(self), self._made_of


@contextlib.contextmanager
def writes(path: str | os.PathLike) -> Iterator[None]:
    """Turn an OSError in the block into a CacheWriteError of the path."""
    try:
        yield
    except OSError as error:
        raise CacheWriteError(path, error) from error
