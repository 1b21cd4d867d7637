"""A cache in an object store.

A store has no rename, so nothing is written under another name first: an object is put under its
own name, in one piece, and that put is the commit. On S3, GCS and their like a put shows whole or
not at all. Where it does not, a torn object is noticed and put again: a shard's header, which comes
first, says how long the shard is; `manifest.json` is put after the index, whose checksum it holds,
and a shard after its quarantine list, whose checksum it holds; `COMPLETE.json` comes last and holds
a checksum of all headers.
"""

from __future__ import annotations

import contextlib
import json
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import numpy as np

from ...errors import one_line
from .errors import CacheWriteError, StoreError

# Requests under way at a time where one answer does not wait for another.
REQUESTS = 16
# First bytes of a shard to fetch: its header takes 700 or so, and a round trip costs more.
HEAD = 4096
# A header longer than this is no header of ours.
MAX_HEADER = 1 << 20

_DTYPES = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "I64": np.int64}


@dataclass(frozen=True)
class UrlPlace:
    """An object or folder in a store; see `Place`.

    Args:
        url: with protocol, without a slash at the end. Keys, regions and endpoints are those of
            fsspec's configuration and of the store's own environment variables.
    """

    url: str
    remote: ClassVar[bool] = True

    @classmethod
    def known(cls, url: str) -> UrlPlace:
        """A place whose protocol can be read; ValueError for others."""
        _files(url)
        return cls(url)

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> UrlPlace:
        return UrlPlace(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> UrlPlace:
        return UrlPlace(self.url.rpartition("/")[0])

    def exists(self) -> bool:
        return self._ask(lambda files, key: files.exists(key))

    occupied = exists

    def is_dir(self) -> bool:
        return False

    is_file = is_dir

    def size(self) -> int:
        """Bytes of an object; FileNotFoundError where there is none."""
        return int(self._ask(lambda files, key: files.info(key)["size"]))

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """An object's bytes, or some of them."""
        return self._ask(lambda files, key: files.cat_file(key, start=start, end=end))

    def open_bytes(self) -> BinaryIO:
        return self._ask(lambda files, key: files.open(key, "rb"))

    def names(self) -> list[str]:
        try:
            found = self._ask(lambda files, key: files.ls(key, detail=False))
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in found]

    @contextlib.contextmanager
    def writing(self) -> Iterator[BinaryIO]:
        """A local file that is put into the store only when the block ends well."""
        try:
            with tempfile.NamedTemporaryFile(prefix="vfmtok-") as file:
                yield file
                file.flush()
                self._ask(lambda files, key: files.put_file(file.name, key), writes=True)
        except OSError as error:
            raise CacheWriteError(self, error) from error

    def put(self, data: bytes) -> None:
        try:
            self._ask(lambda files, key: files.pipe_file(key, data), writes=True)
        except OSError as error:
            raise CacheWriteError(self, error) from error

    def take_over(self, source: UrlPlace) -> None:
        try:
            data = source.read_bytes()
        except FileNotFoundError:
            return  # another process has done it
        self.put(data)
        source.remove()

    def remove(self) -> None:
        try:
            self._ask(lambda files, key: files.rm_file(key))
        except FileNotFoundError:
            return
        except OSError as error:
            raise CacheWriteError(self, error) from error

    def make_folder(self) -> None:
        """A store has no folders."""

    remove_folder = make_folder

    def sweep(self) -> int:
        return 0  # there are no such files

    def tensors(self) -> Any:
        return _RangedTensors(self)

    def spread(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        with ThreadPoolExecutor(REQUESTS, thread_name_prefix="vfmtok-store") as pool:
            yield from pool.map(function, items)

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


class _RangedTensors:
    """A safetensors object of which only what is asked for is fetched."""

    def __init__(self, path: UrlPlace) -> None:
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
