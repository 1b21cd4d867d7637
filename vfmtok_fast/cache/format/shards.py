"""Shards: the tokens of a run of images in one safetensors file, and its quarantine list.

    shards/tokens-00000.safetensors  tokens u16 [n,V,T], index i64 [n], label i32 [n], status u8 [n]
    quarantine/00000.jsonl           one line per bad image; no file if there is none

Writing the shard is the commit: its quarantine list is written first, and the list's checksum is
stored in the shard, so the two always belong together. The bytes depend only on the contents.
safetensors keeps its metadata in a hash map, whose order varies with two or more keys, so there is
a single key that holds sorted JSON.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from safetensors.numpy import save

from ...errors import one_line
from ..store import Place, StoreError, Tensors
from .manifest import BAD_TOKEN, FingerprintMismatch, Manifest, canonical

META_KEY = "vfmtok_fast"
# Written last, once every shard is there.
COMPLETE = "COMPLETE.json"

_NAME = re.compile(r"tokens-(\d{5,})\.safetensors")

OK, BAD, GONE = 0, 1, 2
STATUS_NAMES = {OK: "read", BAD: "not readable", GONE: "gone or changed since it was indexed"}

_DTYPES = {"tokens": np.uint16, "index": np.int64, "label": np.int32, "status": np.uint8}


@dataclass
class Shard:
    """The contents of one shard of n images, V views, T tokens.

    Args:
        number: which shard.
        tokens: uint16 [n, V, T]; 0xFFFF throughout a bad image's slot.
        index: int64 [n], global index.
        label: int32 [n].
        status: uint8 [n]: 0 read, 1 not readable, 2 gone or changed since it was indexed.
        quarantine: a dict with index, path, reason and status for each bad image, in index order.
    """

    number: int
    tokens: np.ndarray
    index: np.ndarray
    label: np.ndarray
    status: np.ndarray
    quarantine: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Header:
    """What a shard's metadata holds; it can be read without the tokens."""

    fingerprint: str
    number: int
    count: int
    bad: int
    checksums: dict[str, str]

    def digest(self) -> str:
        """Hash the whole header; the checksums in it stand for the contents."""
        return hashlib.sha256(canonical(vars(self))).hexdigest()


def shard_path(out: Place, number: int) -> Place:
    """Return the path of shard `number` of the cache `out`."""
    return out / "shards" / f"tokens-{number:05d}.safetensors"


def shard_number(name: str) -> int | None:
    """Return the shard number that a file name holds; None if it is not a shard's name."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


def strays(out: Place, manifest: Manifest) -> list[Place]:
    """Return the shard files in the folder that do not belong to the cache."""
    known = {shard_path(out, number).name for number in range(manifest.shards)}
    names = sorted(set((out / "shards").names()) - known)
    return [out / "shards" / name for name in names if name.endswith(".safetensors")]


def quarantine_path(out: Place, number: int) -> Place:
    """Return the path of shard `number`'s quarantine list, which may not exist."""
    return out / "quarantine" / f"{number:05d}.jsonl"


def write_shard(out: Place, fingerprint: str, shard: Shard) -> None:
    """Commit a shard and its quarantine list; their folders must exist.

    Raises:
        CacheWriteError: a file cannot be written; the shard is then missing, or as it was.
    """
    arrays = {
        name: np.ascontiguousarray(getattr(shard, name), dtype) for name, dtype in _DTYPES.items()
    }
    checksums = {name: _sha256(array) for name, array in arrays.items()}
    lines = b"".join(canonical(entry) + b"\n" for entry in shard.quarantine)
    checksums["quarantine"] = hashlib.sha256(lines).hexdigest()
    header = Header(
        fingerprint, shard.number, len(shard.status), int((shard.status != OK).sum()), checksums
    )
    if lines:
        quarantine_path(out, shard.number).put(lines)
    else:
        quarantine_path(out, shard.number).remove()  # left by a run that died before its commit
    data = save(arrays, metadata={META_KEY: canonical(vars(header)).decode()})
    shard_path(out, shard.number).put(data)


@contextlib.contextmanager
def opened(path: Any, data: bytes | None = None) -> Iterator[tuple[Header, Tensors]]:
    """Open a shard for reading; ``path`` is anything that `Tensors` takes.

    Raises:
        FileNotFoundError, ValueError, OSError: as `read_header`.
    """
    try:
        file = Tensors(path if data is None else data)
        if set(file.header) != set(_DTYPES):
            raise ValueError(f"holds {sorted(file.header)}")
        yield Header(**json.loads(file.meta[META_KEY])), file
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: this shard is missing") from error
    except (KeyError, TypeError, ValueError, IsADirectoryError) as error:
        raise ValueError(f"{path}: damaged or not a shard ({one_line(error)})") from error
    # An error of the store or the disk says nothing about the shard, which must not be made again
    # for it.
    except StoreError:
        raise
    except OSError as error:
        lasting = error.errno in (errno.EACCES, errno.EPERM, errno.EIO)
        advice = (
            "mend its permissions or disk, or remove it if it is lost" if lasting else "run again"
        )
        failed = OSError(f"{path}: cannot be read ({error.strerror or one_line(error)}); {advice}")
        failed.errno = error.errno
        raise failed from error


def read_header(path: Place) -> Header:
    """Read a shard's header; this detects a truncated file but not a flipped bit.

    Raises:
        FileNotFoundError: the shard is missing.
        ValueError: it is damaged or not a shard.
        OSError: the disk or the store does not give it.
    """
    with opened(path) as (header, _):
        return header


def read_shard(path: Place, data: bytes | None = None) -> tuple[Header, Shard]:
    """Read a whole shard, without its quarantine list and without checking it (see `problems`).

    Args:
        path: the shard.
        data: its bytes, if they have been read already.

    Raises:
        FileNotFoundError, ValueError, OSError: as `read_header`.
    """
    with opened(path, data) as (header, file):
        return header, Shard(header.number, **{name: file.get(name) for name in _DTYPES})


def read_quarantine(out: Place, number: int) -> tuple[list[dict[str, Any]], str]:
    """Return a shard's quarantine list (empty if there is no file) and the list's checksum.

    Raises:
        ValueError: the file is damaged.
    """
    path = quarantine_path(out, number)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    try:
        entries = [json.loads(line) for line in data.splitlines()]
        for entry in entries:
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise ValueError("each line must be an object with a path")
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({one_line(error)})") from error
    return entries, hashlib.sha256(data).hexdigest()


def header_problem(header: Header, number: int, manifest: Manifest) -> str | None:
    """Say why a shard cannot be shard `number` of this cache, by its header; None if it can."""
    if header.number != number:
        return f"is shard {header.number}, not {number}"
    if header.count != len(manifest.rows_of(number)):
        return f"holds {header.count} pictures instead of {len(manifest.rows_of(number))}"
    if header.fingerprint != manifest.fingerprint:
        return (
            f"was made by another tokenizer or with other settings (fingerprint "
            f"{header.fingerprint[:12]}... instead of {manifest.fingerprint[:12]}...)"
        )
    return None


def is_outgrown(header: Header, number: int, manifest: Manifest) -> bool:
    """Return whether a shard was whole until the cache was extended; a run makes it again."""
    same = (header.number, header.fingerprint) == (number, manifest.fingerprint)
    return same and header.count < len(manifest.rows_of(number))


def finished(out: Place, number: int, manifest: Manifest, *, refuse: bool = False) -> Header | None:
    """Return the header of a finished shard; None if it is missing or its header does not fit.

    Raises:
        FingerprintMismatch: `refuse` is set and the shard has another fingerprint.
    """
    path = shard_path(out, number)
    try:
        header = read_header(path)
    except (FileNotFoundError, ValueError):
        return None
    problem = header_problem(header, number, manifest)
    if refuse and problem and header.fingerprint != manifest.fingerprint:
        raise FingerprintMismatch(f"{path}: {problem}; remove it and run again")
    return None if problem else header


def problems(header: Header, shard: Shard, number: int, manifest: Manifest) -> list[str]:
    """List all problems of shard `number`: dtypes, shapes, checksums, order, ranges, bad slots.

    Returns:
        One line each; empty if the shard is sound. Comparing with the index and the quarantine list
        is left to the caller, who has them.
    """
    if problem := header_problem(header, number, manifest):
        return [problem]
    count, views = len(manifest.rows_of(number)), len(manifest.views)
    shapes = dict.fromkeys(_DTYPES, (count,)) | {"tokens": (count, views, manifest.num_tokens)}
    found = []
    for name, dtype in _DTYPES.items():
        array = getattr(shard, name)
        if array.dtype != dtype or array.shape != shapes[name]:
            found.append(
                f"{name} is {array.dtype} {array.shape} instead of {np.dtype(dtype)} {shapes[name]}"
            )
        elif _sha256(array) != header.checksums.get(name):
            found.append(f"{name} does not match its checksum")
    if found:
        return found
    if not np.array_equal(shard.index, np.asarray(manifest.rows_of(number))):
        found.append("index is not the run of numbers that belongs to this shard")
    if not np.isin(shard.status, list(STATUS_NAMES)).all():
        found.append(f"status holds values other than {list(STATUS_NAMES)}")
    good = shard.status == OK
    if header.bad != int((~good).sum()):
        found.append(f"says {header.bad} bad pictures, but holds {int((~good).sum())}")
    if (shard.tokens[good] >= manifest.codebook_size).any():
        found.append(f"holds tokens of {manifest.codebook_size} or more")
    if (shard.tokens[~good] != BAD_TOKEN).any():
        found.append("holds tokens for bad pictures")
    return found


def completion(out: Place, found: Manifest) -> dict[str, str | int]:
    """Return what COMPLETE.json must say, given all shards' headers; raises like `read_header`."""
    digest, bad = hashlib.sha256(), 0
    for header in out.spread(read_header, (shard_path(out, n) for n in range(found.shards))):
        digest.update(header.digest().encode())
        bad += header.bad
    return {
        "fingerprint": found.fingerprint,
        "images": found.images,
        "bad": bad,
        "shards": found.shards,
        "headers_sha256": digest.hexdigest(),
    }


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
