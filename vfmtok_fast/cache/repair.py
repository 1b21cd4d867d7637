"""Mending a cache: find what fails verification, and make only that again."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..images import quiet_pillow
from .atomic import remove_file
from .job import COMPLETE, Job, encode_shards, finish
from .manifest import Tokenizer, read_manifest
from .prepare import prepare
from .shards import shard_path
from .store import names
from .verify import shard_problems


def repair(
    images: str | os.PathLike,
    out: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    input_kind: str | None = None,
    workers: int | None = None,
    tell: Callable[[str], None] = lambda problem: None,
) -> int:
    """Encode again every shard that is missing or fails its checks, and no other.

    Args:
        images: the input that the cache was made from.
        out: the cache.
        tokenizer: the one that made it.
        input_kind: what `images` is, where that is not plain from its name.
        workers: threads that read and decode; None: as `vfmtok_fast.cache.build`.
        tell: is given each problem, in one line, before it is mended.

    Returns:
        How many shards were made again.

    Raises: as `vfmtok_fast.cache.build`; another tokenizer or input than that of the cache is
        refused. A damaged manifest or index cannot be mended: they say what the cache is.
    """
    found = read_manifest(out)
    with quiet_pillow():
        job = prepare(
            images,
            out,
            tokenizer,
            input_kind=input_kind,
            views=found.views,
            seed=found.seed,
            batch_size=found.batch_size,
            shard_size=found.shard_size,
            workers=workers,
        )
        damaged = _damaged(job, tell)
        encode_shards(job, damaged)
        finish(job)
    return len(damaged)


def _damaged(job: Job, tell: Callable[[str], None]) -> list[int]:
    numbers = []
    for number in range(job.manifest.shards):
        path = shard_path(job.out, number)
        problems, _ = shard_problems(job.out, job.manifest, number)
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
