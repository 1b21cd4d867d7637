"""One cache folder as a job: prepare it, encode its shards in any order, declare it complete.

    job = prepare(images, out, tokenizer)      index and manifest, or the check that they still fit
    for number in pending(job):                any worker, any order, as often as it likes
        encode_shard(job, number)
    finish(job)                                COMPLETE.json

Nothing here needs a lock: a shard is the same bytes whoever writes it, and takes its name only when
it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..images import decode_image
from . import atomic, index, manifest, shards
from .encode import Advance, encode_rows
from .views import parse_views

INDEX = "index.parquet"
COMPLETE = "COMPLETE.json"

# Decoding saturates one encoder with a few threads; more only hold memory.
MAX_DEFAULT_WORKERS = 8


@dataclass(frozen=True)
class Job:
    """A cache folder that is ready to receive shards."""

    root: Path
    out: Path
    tokenizer: manifest.Tokenizer
    manifest: manifest.Manifest
    workers: int


def prepare(
    images: str | os.PathLike,
    out: str | os.PathLike,
    tokenizer: manifest.Tokenizer,
    *,
    views: Iterable[str] = ("center",),
    batch_size: int = 16,
    shard_size: int = 8192,
    workers: int | None = None,
) -> Job:
    """Index the pictures and write the manifest, or check that those of an earlier run still fit.

    Args, Raises: as `vfmtok_fast.cache.build`.

    Returns:
        What `encode_shard` needs.
    """
    root, out = Path(images), Path(out)
    names = [str(view) for view in parse_views(views)]
    check_count("batch_size", batch_size, 1)
    check_count("shard_size", shard_size, 1)
    if workers is None:
        workers = min(_cpus(), MAX_DEFAULT_WORKERS)
    check_count("workers", workers, 1)
    _check_folders(root, out)
    resumed = (out / manifest.NAME).exists()
    if resumed:
        found = manifest.read_manifest(out)
    else:
        _check_ours(out)
        _check_any_readable(root)
    covers = manifest.describe(tokenizer, names, batch_size)
    if resumed:
        manifest.check_same(found, covers, shard_size, out)
        if index.index_checksum(out / INDEX) != (found.images, found.index_sha256):
            raise ValueError(f"{out / INDEX}: damaged; restore it, or cache anew")
        index.check_unchanged(root, out / INDEX, found.classes)
    for folder in (out, out / "shards", out / "quarantine"):
        atomic.make_folder(folder)
        atomic.sweep(folder)
    if not resumed:
        classes = index.class_folders(root)
        count, checksum = index.write_index(out / INDEX, index.walk(root), classes, shard_size)
        found = manifest.Manifest(covers, shard_size, count, classes, checksum)
        found.write(out)
    return Job(root, out, tokenizer, found, workers)


def pending(job: Job) -> list[int]:
    """Numbers of the shards that are missing or damaged, judged by their headers.

    Raises:
        FingerprintMismatch: a shard of another tokenizer lies in the folder.
    """
    numbers = []
    for number in range(job.manifest.shards):
        path = shards.shard_path(job.out, number)
        try:
            header = shards.read_header(path)
        except (FileNotFoundError, ValueError):
            numbers.append(number)
            continue
        problem = shards.header_problem(header, number, job.manifest)
        if problem and header.fingerprint != job.manifest.fingerprint:
            raise manifest.FingerprintMismatch(f"{path}: {problem}; remove it and run again")
        if problem:
            numbers.append(number)
    return numbers


def encode_shard(job: Job, number: int, advance: Advance | None = None) -> None:
    """Encode one shard and commit it: the same bytes whoever does it, whenever, however often.

    Args:
        job: from `prepare`.
        number: which shard.
        advance: told after each batch; may raise to stop before anything is written.

    Raises: as `vfmtok_fast.cache.build`, for what can go wrong while encoding.
    """
    rows = index.read_rows(job.out / INDEX, number)
    # A cache with a shard to come is not complete, whatever an earlier run said.
    atomic.remove_file(job.out / COMPLETE)
    encoded = encode_rows(job.root, rows, job.manifest, job.tokenizer, job.workers, advance)
    quarantine = [
        {
            "index": rows.first + position,
            "path": rows.paths[position],
            "reason": reason,
            "status": int(encoded.status[position]),
        }
        for position, reason in sorted(encoded.reasons.items())
    ]
    numbers = np.arange(rows.first, rows.first + len(rows), dtype=np.int64)
    labels = np.asarray(rows.labels, np.int32)
    shard = shards.Shard(number, encoded.tokens, numbers, labels, encoded.status, quarantine)
    shards.write_shard(job.out, job.manifest.fingerprint, shard)


def finish(job: Job) -> int:
    """Write COMPLETE.json, if every shard is there.

    Returns:
        The number of quarantined pictures.

    Raises:
        ValueError: shards are missing, or not one picture could be read.
    """
    missing = pending(job)
    if missing:
        raise ValueError(
            f"{job.out}: {len(missing)} of {job.manifest.shards} shards are missing; run again"
        )
    content = completion(job.out, job.manifest)
    if content["bad"] == job.manifest.images:
        raise ValueError(
            f"{job.root}: none of its {job.manifest.images} pictures could be read; "
            f"{job.out / 'quarantine'} says why"
        )
    data = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    path = job.out / COMPLETE
    if not path.exists() or path.read_bytes() != data:
        atomic.write_atomic(path, data)
    return content["bad"]


def completion(out: Path, found: manifest.Manifest) -> dict[str, str | int]:
    """What COMPLETE.json must say, from the headers of all shards; raises like `read_header`."""
    digest, bad = hashlib.sha256(), 0
    for number in range(found.shards):
        header = shards.read_header(shards.shard_path(out, number))
        digest.update(header.digest().encode())
        bad += header.bad
    return {
        "fingerprint": found.fingerprint,
        "images": found.images,
        "bad": bad,
        "shards": found.shards,
        "headers_sha256": digest.hexdigest(),
    }


def check_count(name: str, value: int, least: int) -> None:
    """Refuse what is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"cache: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"cache: {name} must be at least {least}, got {value}")


def _cpus() -> int:
    # macOS has no affinity; elsewhere it is what a container or a scheduler allows.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_folders(root: Path, out: Path) -> None:
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder of pictures")
    if not root.is_dir():
        raise NotADirectoryError(f"{root}: must be a folder of pictures, is a file")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out}: must be a folder, is a file; choose another name")
    if out.resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"{out}: lies inside the pictures' folder {root}, where it would become a class; "
            "choose a folder outside"
        )


def _check_ours(out: Path) -> None:
    """Refuse a folder that holds anything but what a run leaves that died before its manifest."""
    if not out.exists():
        return
    for entry in sorted(os.scandir(out), key=lambda entry: entry.name):
        ours = atomic.is_temporary(entry.name)
        if entry.name == INDEX:
            ours = index.is_index(Path(entry.path))
        elif entry.name in ("shards", "quarantine") and entry.is_dir():
            ours = all(atomic.is_temporary(name) for name in os.listdir(entry.path))
        if not ours:
            raise FileExistsError(
                f"{out}: holds something else ({entry.name!r}) and is left alone; "
                "choose a new or empty folder"
            )


def _check_any_readable(root: Path) -> None:
    """Before anything is written: is there one picture at all?"""
    count, first = 0, ""
    for name, _ in index.walk(root):
        count += 1
        try:
            decode_image(root / name)
            return
        except FileNotFoundError:
            first = first or f"{name!r}: does not exist"
        except OSError as error:
            first = first or f"{name!r}: {error.strerror}"
        except ValueError as error:
            reason = str(error).removeprefix(f"{root / name}: ")
            first = first or f"{name!r}: {reason}"
    if count == 0:
        raise ValueError(
            f"{root}: no pictures here or in the folders below "
            f"(looked for {', '.join(sorted(index.EXTENSIONS))})"
        )
    raise ValueError(f"{root}: none of its {count} pictures can be read; the first is {first}")
