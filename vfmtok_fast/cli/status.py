"""`vfmtok-fast status`."""

from __future__ import annotations

import argparse
import itertools

from .output import say

SUMMARY = "show how far a cache is"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="CACHE", help="the cache's folder or URL")
    parser.add_argument(
        "--failures", type=int, default=10, help="unreadable pictures to list (%(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    from .. import cache

    if options.failures < 0:
        raise ValueError(f"--failures must be at least 0, got {options.failures}")
    found = cache.status(options.out)
    say(f"{options.out}: {found.state}")
    if found.state != "indexing":
        say(f"  pictures: {found.done} of {found.images} done, {found.bad} could not be read")
        say(f"  shards:   {found.shards_done} of {found.shards}")
        say(f"  views:    {', '.join(found.views)}")
    if found.damaged:
        say(f"  damaged:  shards {', '.join(map(str, found.damaged))} (made again by cache)")
    if found.writing:
        say(f"  files being written, or left by a process that died: {found.writing}")
    if found.bad and options.failures:
        for entry in itertools.islice(cache.failures(options.out), options.failures):
            say(f"  {entry['path']}: {entry['reason']}")
    if found.state != "complete":
        return 1
    return 3 if found.bad else 0
