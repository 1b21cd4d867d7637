"""Read a cache: random access to the tokens of single images, straight from the files.

Tokens are stored as unsigned 16-bit integers, a type that few torch operations support, so the
reader returns int64. From a cache in a store, each shard is copied to this machine when it is first
needed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import operator
import os
import resource
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..format import shards
from ..format.manifest import Manifest, read_manifest
from ..store import Place, place

# Shards that a cache holds open at a time; fewer if that is more than this part of the files that
# the process may have open, because it may read other caches, too.
MOST_OPEN = 4096
PART = 8


class TokenCache:
    """The readable images of a cache, as (tokens, label); a map-style data set.

    Bad images are left out, so positions run from 0 to len - 1 without gaps; `rows[i]` is the
    global index of the image at position i. Memory use is a few bytes per image; tokens are read on
    demand. The object can be sent to worker processes, which open the files for themselves.

    If a shard is rewritten later (the cache is extended, repaired or rebuilt), a reader that has it
    open keeps reading the old one, and opening the new one raises ValueError.

    Args:
        out: the cache's folder or URL.
        view: name of the view to return; None: all of them.
        partial: accept a cache that is not complete, and take its finished shards.
        mirror: for a cache in a store: the local folder that shards are copied to. Processes may
            share it, and later runs reuse it; None: one of its own below ~/.cache/vfmtok_fast
            (or $XDG_CACHE_HOME).

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: the cache is damaged, incomplete (without `partial`), or has no such view.
        OSError: the disk or the store does not give a shard.
    """

    def __init__(
        self, out: str | os.PathLike, view: str | None = None, *, partial: bool = False,
        mirror: str | os.PathLike | None = None,
    ) -> None:  # fmt: skip
        self.out = place(out)
        self.manifest: Manifest = read_manifest(self.out)
        names = self.manifest.views
        if view is not None and view not in names:
            raise ValueError(f"{out}: has the views {', '.join(names)}, not {view!r}")
        self._view = slice(None) if view is None else names.index(view)
        if not partial and not (self.out / shards.COMPLETE).exists():
            raise ValueError(
                f"{out}: not complete; finish it with `vfmtok-fast cache`; in Python, partial=True "
                "reads the finished shards"
            )
        rows, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        self._files: OrderedDict[int, _Rows] = OrderedDict()
        self._known: dict[int, tuple] = {}  # stamp and layout of the shards opened so far
        self._partial, self._digests = partial, {}
        self._mirror = None
        if self.out.remote:
            self._mirror = place(_default_mirror(self.out) if mirror is None else os.fspath(mirror))
            if self._mirror.remote:
                raise ValueError(f"{mirror}: a mirror must be a local folder")
        found_in = self.out.spread(self._look, range(self.manifest.shards))
        for number, found in enumerate(found_in):
            if found is not None:
                self._digests[number], good_rows, good_labels = found
                rows.append(good_rows)
                labels.append(good_labels)
        self.rows: np.ndarray = np.concatenate(rows)
        self.labels: np.ndarray = np.concatenate(labels)

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a label is a position in this list, -1 is none."""
        return self.manifest.classes

    def __repr__(self) -> str:
        every = self.manifest.views
        views = every if self._view == slice(None) else [every[self._view]]
        return (
            f"TokenCache({str(self.out)!r}): {len(self)} pictures of {len(self.classes)} classes, "
            f"{self.manifest.num_tokens} tokens of each view: {', '.join(views)}"
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        """Return tokens int64 [T], or [V, T] for all views, and the label of one image."""
        position = operator.index(position)
        if not -len(self) <= position < len(self):
            raise IndexError(f"{self.out}: has {len(self)} pictures, no position {position}")
        number, row = divmod(int(self.rows[position]), self.manifest.shard_size)
        tokens = self._tokens(number)[row][self._view]
        return torch.from_numpy(tokens.astype(np.int64)), int(self.labels[position])

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        return (self[position] for position in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be pickled; the other process opens them again on first use.
        return {**self.__dict__, "_files": OrderedDict(), "_known": {}}

    def _look(self, number: int) -> tuple[str, np.ndarray, np.ndarray] | None:
        """Return the digest of a shard's header, and index and label of its readable images."""
        path = shards.shard_path(self.out, number)
        try:
            with shards.opened(path) as (header, file):
                index, label, status = map(file.get, ("index", "label", "status"))
        except FileNotFoundError:
            if self._partial:
                return None
            raise
        if problem := shards.header_problem(header, number, self.manifest):
            if self._partial and shards.is_outgrown(header, number, self.manifest):
                return None
            raise ValueError(f"{path}: {problem}")
        good = status == shards.OK
        return header.digest(), index[good], label[good]

    def _copy(self, number: int) -> Place:
        """Return the local copy of a shard; if missing, fetch it and check it to the last byte."""
        path = shards.shard_path(self.out, number)
        name = f"{number:05d}-{self._digests[number][:16]}.safetensors"
        copy = self._mirror / name
        if not copy.exists():
            data = path.read_bytes()
            header, shard = shards.read_shard(path, data)
            self._check_unchanged(path, number, header)
            if wrong := shards.problems(header, shard, number, self.manifest):
                raise ValueError(f"{path}: {wrong[0]}; run vfmtok-fast repair")
            self._mirror.make_folder()
            copy.put(data)
        return copy

    def _tokens(self, number: int) -> _Rows:
        rows = self._files.get(number)
        while rows is None:
            self._close_all_but(_most_open() - 1)
            try:
                rows = self._open(number)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._files:
                    raise
                self._close_all_but(len(self._files) // 2)  # the rest of the program has many open
        return rows

    def _open(self, number: int) -> _Rows:
        remote = self._mirror is not None
        path = self._copy(number) if remote else shards.shard_path(self.out, number)
        rows = _Rows(path)
        # Parsing and hashing the header takes far longer than opening the file.
        if self._known.get(number, (None, None))[0] == rows.stamp:
            rows.layout = self._known[number][1]
        else:
            self._check_unchanged(path, number, rows.read_header())
            self._known[number] = rows.stamp, rows.layout
        self._files[number] = rows
        return rows

    def _close_all_but(self, kept: int) -> None:
        """Close the files that were opened first; other threads, which may read them, do so too."""
        while len(self._files) > kept:
            with contextlib.suppress(KeyError):
                self._files.popitem(last=False)

    def _check_unchanged(self, path: Place, number: int, header: shards.Header) -> None:
        """Refuse a shard that is not the one that positions and labels were read from."""
        if header.digest() != self._digests[number]:
            raise ValueError(f"{path}: changed since this cache was opened; open it again")


class _Rows:
    """The tokens of a shard's images, read one by one from a file that is held open.

    Not memory-mapped: if a mapped file shrinks while it is read, SIGBUS ends the process.
    """

    def __init__(self, path: Place) -> None:
        self.path, self.file = path, open(path, "rb", buffering=0)
        about = os.fstat(self.file.fileno())
        # Another file, or one that was written to, differs in it.
        self.stamp = about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns

    def read_header(self) -> shards.Header:
        # Read from the open file: another file may take its name at any moment.
        with shards.opened(self) as (header, tensors):
            tokens = tensors.header["tokens"]
        shape = tokens["shape"][1:]
        row_bytes = math.prod(shape) * np.dtype(np.uint16).itemsize
        self.layout = tensors.start + tokens["data_offsets"][0], row_bytes, shape
        return header

    def __str__(self) -> str:
        return str(self.path)

    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def read_range(self, start: int, end: int) -> bytes:
        # With pread, because forked processes share the file and its position.
        return os.pread(self.file.fileno(), end - start, start)

    def __getitem__(self, row: int) -> np.ndarray:
        """Return uint16 [V, T]."""
        start, row_bytes, shape = self.layout
        start += row * row_bytes
        data = self.read_range(start, start + row_bytes)
        if len(data) < row_bytes:
            raise ValueError(f"{self.path}: was cut short; run vfmtok-fast repair")
        return np.frombuffer(data, np.uint16).reshape(shape)


def _most_open() -> int:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if limit < 0 else max(1, min(MOST_OPEN, limit // PART))


def _default_mirror(out: Place) -> str:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return os.path.join(root, "vfmtok_fast", hashlib.sha256(str(out).encode()).hexdigest()[:16])


def read_tokens(out: str | os.PathLike, view: str = "center") -> tuple[np.ndarray, np.ndarray]:
    """Read one view of all readable images at once, for caches that fit into memory.

    Args:
        out: the cache's folder; must be complete.
        view: name of the view.

    Returns:
        Tokens uint16 [N, T] and labels int32 [N], in index order.

    Raises:
        FileNotFoundError, ValueError: as `TokenCache`.
    """
    cache = TokenCache(out, view)
    parts = [np.zeros((0, cache.manifest.num_tokens), np.uint16)]
    for number in range(cache.manifest.shards):
        path = shards.shard_path(cache.out, number)
        header, shard = shards.read_shard(path)
        cache._check_unchanged(path, number, header)
        parts.append(shard.tokens[shard.status == shards.OK, cache._view])
    return np.concatenate(parts), cache.labels
