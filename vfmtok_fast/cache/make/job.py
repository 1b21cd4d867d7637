"""One cache folder as a job: prepare it, encode its shards in any order, mark it complete.

    job = prepare(images, out, tokenizer)      index and manifest, or the check that they still fit
    for number in pending(job):                any worker, any order, any number of times
        encode_shard(job, number)
    finish(job)                                COMPLETE.json

Nothing here needs a lock: a shard has the same bytes whoever writes it, and takes its name only
when it is complete.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from ..format import index, manifest, shards
from ..format.fingerprint import Tokenizer
from ..format.index import INDEX
from ..sources import Source
from ..store import Place
from .changes import ImagesChanged
from .encode import Advance, Encoded, Waits, encode_parts


@dataclass(frozen=True)
class Job:
    """A cache folder that is ready to receive shards."""

    source: Source
    out: Place
    tokenizer: Tokenizer
    manifest: manifest.Manifest
    workers: int


def pending(job: Job) -> list[int]:
    """Return the numbers of the shards that are missing or damaged, judging by their headers.

    Raises:
        FingerprintMismatch: the folder holds a shard of another tokenizer.
    """
    headers = job.out.spread(lambda number: finished(job, number), range(job.manifest.shards))
    return [number for number, header in enumerate(headers) if header is None]


def finished(job: Job, number: int) -> shards.Header | None:
    """Return the header of one shard; None if it is missing or damaged; raises like `pending`."""
    try:
        return shards.finished(job.out, number, job.manifest, refuse=True)
    except manifest.FingerprintMismatch:
        _check_current(job)  # Another run may have restarted the cache, with this shard in it.
        raise


def encode_shard(job: Job, number: int, advance: Advance | None = None) -> None:
    """Encode one shard and commit it; like `encode_shards`."""
    encode_shards(job, [number], advance)


def encode_shards(
    job: Job, numbers: Iterable[int], advance: Advance | None = None, waits: Waits | None = None
) -> None:
    """Encode shards and commit them; the bytes are always the same, and repeating it is harmless.

    A shard is written while the next one is encoded.

    Args:
        job: from `prepare`.
        numbers: which shards; each number is requested as late as possible.
        advance: called after each batch; may raise to stop, and then the shard of that batch is not
            written.
        waits: waiting times are added to it.

    Raises: as `vfmtok_fast.cache.build`, for what can go wrong while encoding.
    """
    parts = _parts(job, numbers)
    encoding = encode_parts(
        job.source, parts, job.manifest, job.tokenizer, job.workers, advance, waits
    )
    writer = ThreadPoolExecutor(1, "vfmtok-write")
    # Start the thread before it has anything to do. If an interrupt came while it started, nothing
    # would wait for it, and the process could exit before its file is complete.
    writing = writer.submit(int)
    writing.result()
    try:
        with contextlib.closing(parts), contextlib.closing(encoding), writer:
            for number, rows, encoded in encoding:
                writing.result()
                writing = writer.submit(_commit, job, number, rows, encoded)
            writing.result()
    finally:
        wait([writing])  # again, in case an interrupt ended the first wait


def _parts(job: Job, numbers: Iterable[int]) -> Iterator[tuple[int, index.Rows]]:
    with contextlib.ExitStack() as stack:
        found = None
        for number in numbers:
            try:
                found = found or stack.enter_context(index.opened(job.out / INDEX))
                rows = found.rows(number)
            except ValueError:
                _check_current(job)  # On some disks and stores, a replaced index is cut off.
                raise
            # A cache with a shard still to be made is not complete, whatever an earlier run wrote.
            (job.out / shards.COMPLETE).remove()
            yield number, rows


def _commit(job: Job, number: int, rows: index.Rows, encoded: Encoded) -> None:
    paths, status = rows.paths, encoded.status.tolist()
    quarantine = [
        {"index": rows.first + i, "path": paths[i], "reason": reason, "status": status[i]}
        for i, reason in sorted(encoded.reasons.items())
    ]
    positions = np.arange(rows.first, rows.first + len(rows), dtype=np.int64)
    labels = np.asarray(rows.labels, np.int32)
    shard = shards.Shard(number, encoded.tokens, positions, labels, encoded.status, quarantine)
    _check_current(job)
    shards.write_shard(job.out, job.manifest.fingerprint, shard)
    try:
        _check_current(job)
    except ImagesChanged:
        # It may have overwritten a shard with more images that another process made meanwhile.
        shards.shard_path(job.out, number).remove()
        (job.out / shards.COMPLETE).remove()
        raise


def _check_current(job: Job) -> None:
    """Refuse to write into a cache that another process has changed since this one started."""
    now = manifest.read_manifest(job.out)
    if now.batch_size != job.manifest.batch_size:
        raise ImagesChanged(
            f"{job.out}: another run has started it with a batch size of {now.batch_size} instead "
            f"of {job.manifest.batch_size}; run again, with the same batch size everywhere"
        )
    if now != job.manifest:
        raise ImagesChanged(
            f"{job.out}: another run has extended it from {job.manifest.images} to {now.images} "
            "pictures; run again to include those"
        )


def finish(job: Job) -> int:
    """Write COMPLETE.json, if every shard is there.

    Returns:
        The number of quarantined images.

    Raises:
        ValueError: shards are missing, or no image could be read.
    """
    missing = pending(job)
    if missing:
        raise ValueError(
            f"{job.out}: {len(missing)} of {job.manifest.shards} shards are missing; run again"
        )
    content = shards.completion(job.out, job.manifest)
    if content["bad"] == job.manifest.images:
        raise ValueError(
            f"{job.source.root}: none of its {job.manifest.images} pictures could be read; "
            f"{job.out / 'quarantine'} says why"
        )
    data = (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()
    _check_current(job)
    path, there = job.out / shards.COMPLETE, None
    with contextlib.suppress(FileNotFoundError):  # a process that makes a shard removes it
        there = path.read_bytes()
    if there != data:
        path.put(data)
    return content["bad"]
