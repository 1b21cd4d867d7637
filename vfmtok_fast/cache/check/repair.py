"""Repair a cache: find what fails verification, and make only that again."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from ...images import quiet_pillow
from ..format.fingerprint import Tokenizer
from ..format.index import INDEX, OpenIndex, opened
from ..format.manifest import read_manifest
from ..format.shards import COMPLETE, read_quarantine, shard_path, strays
from ..format.views import parse_views, plan_views
from ..make.encode import decode
from ..make.extension import extend
from ..make.job import Job, encode_shards, finish
from ..make.prepare import prepare
from ..make.spec import CacheSpec
from ..sources import BadImage, choices_of
from ..store import place
from .verify import shard_problems


def repair(
    images: str | os.PathLike, out: str | os.PathLike, tokenizer: Tokenizer, *,
    input_kind: str | None = None, workers: int | None = None,
    tell: Callable[[str], None] = lambda problem: None,
) -> int:  # fmt: skip
    """Encode again every shard that is missing, fails its checks, or lacks images now readable.

    The last case is an image that was quarantined when its shard was made, because it was gone for
    a while, or its disk failed, or it was damaged and has been repaired.

    Args:
        images: the input that the cache was made from.
        out: the cache.
        tokenizer: the one that made it.
        input_kind: what `images` is; None: what the cache was made from.
        workers: threads that read and decode; None: as `vfmtok_fast.cache.build`.
        tell: called with each problem, in one line, before it is repaired.

    Returns:
        The number of shards made again.

    Raises: as `vfmtok_fast.cache.build`; a tokenizer or input other than the cache's is refused. A
        damaged manifest or index cannot be repaired, because they say what the cache is.
    """
    found = read_manifest(out)
    kind, choices = choices_of(place(out) / INDEX)
    with quiet_pillow():
        spec = CacheSpec(
            input_kind=input_kind or kind, views=found.views, seed=found.seed,
            batch_size=found.batch_size, shard_size=found.shard_size, workers=workers, **choices,
        )  # fmt: skip
        job = prepare(images, out, tokenizer, spec)
        # Images that somebody repaired have another size than when they were indexed.
        job = replace(job, manifest=extend(job.source, job.out, job.manifest, job.workers))
        damaged = _damaged(job, tell)
        encode_shards(job, damaged)
        finish(job)
    return len(damaged)


def _readable_again(job: Job, listed: OpenIndex, number: int) -> int:
    """Count a sound shard's quarantined images that can be read now."""
    found = job.manifest
    plan = plan_views(parse_views(found.views), found.image_size)
    rows = listed.rows(number)
    places = (bad["index"] - rows.first for bad in read_quarantine(job.out, number)[0])
    again = (decode(job.source, rows.entries[place], plan, found) for place in places)
    return sum(not isinstance(picture, BadImage) for picture in again)


def _damaged(job: Job, tell: Callable[[str], None]) -> list[int]:
    numbers = []
    with opened(job.out / INDEX) as listed:
        for number in range(job.manifest.shards):
            path = shard_path(job.out, number)
            problems, bad = shard_problems(job.out, job.manifest, listed, number)
            if bad and not problems and (back := _readable_again(job, listed, number)):
                problems = [f"{back} of its {bad} quarantined pictures can be read now"]
            for problem in problems:
                tell(f"{path}: {problem}")
            if problems:
                # Remove all before encoding: if this run dies, the next one sees what is left.
                (job.out / COMPLETE).remove()
                path.remove()
                numbers.append(number)
    for stray in strays(job.out, job.manifest):
        tell(f"{stray}: does not belong to this cache, and is left alone")
    return numbers
