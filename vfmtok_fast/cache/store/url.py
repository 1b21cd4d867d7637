"""A cache in an object store.

A store has no rename, so nothing is written under a temporary name first: an object is put under
its final name in one piece, and that put is the commit. On S3, GCS and similar stores a put becomes
visible whole or not at all. On other stores, a torn object is noticed and put again: a shard's
header, which comes first, says how long the shard is; `manifest.json` is put after the index and
holds its checksum; a shard is put after its quarantine list and holds its checksum; `COMPLETE.json`
comes last and holds a checksum of all headers.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

from ...errors import one_line
from .errors import StoreError, writes

# Requests sent at once, where none depends on the answer to another.
REQUESTS = 16


@dataclass(frozen=True)
class UrlPlace:
    """An object or folder in a store; its methods are described at `LocalPlace`.

    Args:
        url: with its protocol, without a trailing slash. Keys, regions and endpoints come from
            fsspec's configuration and the store's own environment variables.
    """

    url: str
    remote: ClassVar[bool] = True

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

    def size(self) -> int:
        return int(self._ask(lambda files, key: files.info(key)["size"]))

    def read_bytes(self) -> bytes:
        return self._ask(lambda files, key: files.cat_file(key))

    def read_range(self, start: int, end: int) -> bytes:
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
        """Yield a local file that is put into the store only if the block ends without an error."""
        with writes(self), tempfile.NamedTemporaryFile(prefix="vfmtok-") as file:
            yield file
            file.flush()
            self._ask(lambda files, key: files.put_file(file.name, key), puts=True)

    def put(self, data: bytes) -> None:
        with writes(self):
            self._ask(lambda files, key: files.pipe_file(key, data), puts=True)

    def take_over(self, source: UrlPlace) -> None:
        try:
            data = source.read_bytes()
        except FileNotFoundError:
            return  # another process has done it
        self.put(data)
        source.remove()

    def remove(self) -> None:
        with writes(self), contextlib.suppress(FileNotFoundError):
            self._ask(lambda files, key: files.rm_file(key))

    def make_folder(self) -> None:
        """Do nothing: a store has no folders."""

    def spread(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        with ThreadPoolExecutor(REQUESTS, thread_name_prefix="vfmtok-store") as pool:
            yield from pool.map(function, items)

    def _ask(self, question: Callable[[Any, str], Any], puts: bool = False) -> Any:
        files, key = files_of(self.url)
        try:
            return question(files, key)
        except FileNotFoundError as error:
            if puts:  # no such bucket
                raise StoreError(self.url, error) from error
            raise FileNotFoundError(f"{self.url}: does not exist") from error
        except Exception as error:
            # Each store raises its own errors; not all of them are OSErrors.
            raise StoreError(self.url, error) from error


def files_of(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, or raise ValueError; and the URL as it expects it."""
    import fsspec

    protocol = url.partition("://")[0]
    try:
        # Other processes write too, so a listing from a moment ago may be out of date.
        files = fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError as error:
        raise ValueError(
            f"{url}: {one_line(error)}; pip install 'vfmtok-fast[cloud]' adds S3 and GCS"
        ) from error
    except ValueError as error:
        raise ValueError(f"{url}: {one_line(error)}") from error
    return files, files._strip_protocol(url)
