"""Mending a cache: find what fails verification, and make only that again."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..images import quiet_pillow
from .atomic import remove_file
from .encode import decode
from .index import read_choices, read_rows
from .job import COMPLETE, INDEX, Job, encode_shards, finish
from .manifest import Tokenizer, read_manifest
from .prepare import prepare
from .shards import read_quarantine, shard_path
from .sources import BadImage
from .store import names, place
from .verify import shard_problems
from .views import parse_views, plan_views


def repair(
    images: str | os.PathLike,
    out: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    input_kind: str | None = None,
    workers: int | None = None,
    tell: Callable[[str], None] = lambda problem: None,
) -> int:
    """Encode again every shard that is missing, fails its checks, or lacks what can be read now.

    The latter is a picture that was quarantined when its shard was made, because it was gone for a
    while or its disk failed, and is there again as it was indexed.

    Args:
        images: the input that the cache was made from.
        out: the cache.
        tokenizer: the one that made it.
        input_kind: what `images` is; None: what the cache was made from.
        workers: threads that read and decode; None: as `vfmtok_fast.cache.build`.
        tell: is given each problem, in one line, before it is mended.

    Returns:
        How many shards were made again.

    Raises: as `vfmtok_fast.cache.build`; another tokenizer or input than that of the cache is
        refused. A damaged manifest or index cannot be mended: they say what the cache is.
    """
    found = read_manifest(out)
    kind, choices = read_choices(place(out) / INDEX)
    with quiet_pillow():
        job = prepare(
            images,
            out,
            tokenizer,
            input_kind=input_kind or kind,
            views=found.views,
            seed=found.seed,
            batch_size=found.batch_size,
            shard_size=found.shard_size,
            workers=workers,
            **choices,
        )
        damaged = _damaged(job, tell)
        encode_shards(job, damaged)
        finish(job)
    return len(damaged)


def _readable_again(job: Job, number: int) -> int:
    """How many of a sound shard's quarantined pictures can be read now."""
    found = job.manifest
    plan = plan_views(parse_views(found.views), found.image_size)
    rows = read_rows(job.out / INDEX, number)
    entries = list(rows.entries())
    quarantined = read_quarantine(job.out, number)[0]
    again = (decode(job.source, entries[e["index"] - rows.first], plan, found) for e in quarantined)
    return sum(not isinstance(picture, BadImage) for picture in again)


def _damaged(job: Job, tell: Callable[[str], None]) -> list[int]:
    numbers = []
    for number in range(job.manifest.shards):
        path = shard_path(job.out, number)
        problems, bad = shard_problems(job.out, job.manifest, number)
        if bad and (back := _readable_again(job, number)):
            problems = [f"{back} of its {bad} quarantined pictures can be read now"]
        for problem in problems:
            tell(f"{path}: {problem}")
        if problems:
            # All at once and first: if this run dies, the next one still knows what to make.
            remove_file(job.out / COMPLETE)
            remove_file(path)
            numbers.append(number)
    known = {shard_path(job.out, number).name for number in range(job.manifest.shards)}
    for name in sorted(set(names(job.out / "shards")) - known):
        if name.endswith(".safetensors"):
            tell(f"{job.out / 'shards' / name}: does not belong to this cache, and is left alone")
    return numbers
