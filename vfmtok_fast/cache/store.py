"""Where a cache lies: a local folder, or a URL of an object store that fsspec reaches.

A store has no rename, so nothing is written under another name first: an object is put under its
own name, in one piece, and that put is the commit. On S3, GCS and their like a put shows whole or
not at all. Where it does not, a torn object is noticed and put again: a shard's header, which comes
first, says how long the shard is; `manifest.json` is put after the index, whose checksum it holds,
and a shard after its quarantine list, whose checksum it holds; `COMPLETE.json` comes last and holds
a checksum of all headers. So a cache has the same files on a disk and in a store, and may be copied
from one to the other with any tool.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import safe_open

from ..errors import one_line

# Requests under way at a time where one answer does not wait for another.
REQUESTS = 16
# First bytes of a shard to fetch: its header takes 700 or so, and a round trip costs more.
HEAD = 4096
# A header longer than this is no header of ours.
MAX_HEADER = 1 << 20

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "I64": np.int64}


class StoreError(OSError):
    """A store did not do what was asked: not reachable, no permission, no such bucket, ..."""

    def __init__(self, url: str, error: Exception) -> None:
        super().__init__(f"{url}: {one_line(error)}")
        self.errno, self.reason = getattr(error, "errno", None), one_line(error)
        self._made_of = url, error

    def __reduce__(self) -> tuple:
        return type(self), self._made_of


@dataclass(frozen=True)
class UrlPath:
    """An object or folder in a store, with those methods of `pathlib.Path` that a cache needs.

    Args:
        url: with protocol, without a slash at the end. Keys, regions and endpoints are those of
            fsspec's configuration and of the store's own environment variables.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> UrlPath:
        return UrlPath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> UrlPath:
        return UrlPath(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        return self._ask(lambda files, key: files.exists(key))

    def size(self) -> int:
        """Bytes of an object; FileNotFoundError where there is none."""
        return int(self._ask(lambda files, key: files.info(key)["size"]))

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """An object's bytes, or some of them; FileNotFoundError where there is none."""
        return self._ask(lambda files, key: files.cat_file(key, start=start, end=end))

    def open(self) -> BinaryIO:
        """Open an object for reading; what is asked for is fetched."""
        return self._ask(lambda files, key: files.open(key, "rb"))

    def names(self) -> list[str]:
        """Names of what lies directly below; none where there is nothing."""
        try:
            found = self._ask(lambda files, key: files.ls(key, detail=False))
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    def write_bytes(self, data: bytes) -> None:
        """Put an object in one piece."""
        self._ask(lambda files, key: files.pipe_file(key, data), writes=True)

    def upload(self, path: str) -> None:
        """Put a local file as an object."""
        self._ask(lambda files, key: files.put_file(path, key), writes=True)

    def remove(self) -> None:
        """Remove an object; FileNotFoundError where there is none."""
        self._ask(lambda files, key: files.rm_file(key))

    def _ask(self, question: Callable[[Any, str], Any], writes: bool = False) -> Any:
        files, key = _files(self.url)
        try:
            return question(files, key)
        except FileNotFoundError as error:
            if writes:  # no such bucket
                raise StoreError(self.url, error) from error
            raise FileNotFoundError(f"{self.url}: not there") from error
        except Exception as error:
            # Each store has errors of its own; not all of them are OSErrors.
            raise StoreError(self.url, error) from error


Place = Path | UrlPath


def place(out: str | os.PathLike | UrlPath) -> Place:
    """A local path, or for a URL with a protocol (s3://, gs://, memory://, ...) a UrlPath.

    Raises:
        ValueError: the protocol is unknown, or what reads it is not installed.
    """
    if isinstance(out, UrlPath):
        return out
    protocol, mark, rest = os.fspath(out).partition("://")
    if not mark:
        return Path(out)
    if protocol in ("file", "local"):
        return Path("/" + rest.lstrip("/"))
    found = UrlPath(os.fspath(out).rstrip("/"))
    _files(found.url)
    return found


def absolute(out: str | os.PathLike | UrlPath) -> Place:
    """As `place`, a local path from the root on."""
    found = place(out)
    return found if isinstance(found, UrlPath) else found.absolute()


def names(folder: Place) -> list[str]:
    """Names of what lies in a folder; none where it is missing."""
    if isinstance(folder, UrlPath):
        return folder.names()
    return os.listdir(folder) if folder.is_dir() else []


def open_binary(path: Place) -> BinaryIO:
    """Open a file or an object for reading."""
    return path.open() if isinstance(path, UrlPath) else open(path, "rb")


def spread(out: Place, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map`, in order; of a store with many requests under way."""
    if not isinstance(out, UrlPath):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="vfmtok-store") as pool:
        yield from pool.map(function, items)


def open_tensors(path: Place) -> Any:
    """A safetensors file as a context manager with `metadata`, `keys` and `get_tensor`.

    Raises:
        FileNotFoundError: it is not there.
        safetensors.SafetensorError, ValueError, OSError: it is cut short or not such a file.
    """
    if isinstance(path, UrlPath):
        return _RangedTensors(path)
    return safe_open(path, framework="numpy")


class _RangedTensors:
    """A safetensors object of which only what is asked for is fetched."""

    def __init__(self, path: UrlPath) -> None:
        self.path = path
        size, head = path.size(), path.read_bytes(0, HEAD)
        (length,) = struct.unpack("<Q", head[:8]) if len(head) >= 8 else (MAX_HEADER + 1,)
        if length > MAX_HEADER:
            raise ValueError("no safetensors header")
        if 8 + length > len(head):
            head = path.read_bytes(0, 8 + length)
        self.start = 8 + length
        self.header = json.loads(head[8 : self.start])
        self.meta = self.header.pop("__metadata__", {})
        ends = [self.start + entry["data_offsets"][1] for entry in self.header.values()]
        if max(ends, default=self.start) != size:
            raise ValueError(f"holds {size} bytes instead of {max(ends, default=self.start)}")

    def __enter__(self) -> _RangedTensors:
        return self

    def __exit__(self, *error: object) -> None:
        """For `safe_open`'s sake."""

    def metadata(self) -> dict[str, str]:
        return self.meta

    def keys(self) -> Iterable[str]:
        return self.header.keys()

    def get_tensor(self, name: str) -> np.ndarray:
        entry = self.header[name]
        start, end = (self.start + offset for offset in entry["data_offsets"])
        data = self.path.read_bytes(start, end) if end > start else b""
        return np.frombuffer(data, _DTYPES[entry["dtype"]]).reshape(entry["shape"])


def _files(url: str) -> tuple[Any, str]:
    """The file system that fsspec has for a URL, and the URL as that wants it."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        # Others write too: what was listed a moment ago says nothing.
        files = fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError as error:
        raise ValueError(
            f"{url}: {one_line(error)}; pip install 'vfmtok-fast[cloud]' brings S3 and GCS"
        ) from error
    except ValueError as error:
        raise ValueError(f"{url}: {one_line(error)}") from error
    return files, files._strip_protocol(url)
