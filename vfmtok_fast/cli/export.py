"""`vfmtok-fast export`."""

from __future__ import annotations

import argparse

from .choices import FORMATS
from .output import note, note_unlabelled, say

SUMMARY = "write a cache in the format of another program"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="CACHE", help="the cache's folder or URL")
    parser.add_argument("target", metavar="TARGET", help="what to write; must not exist")
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="LlamaGen's folders of .npy, RAR's lines of JSON, or Parquet",
    )
    parser.add_argument(
        "--views", nargs="+", metavar="VIEW", help="views of the cache to write; all by default"
    )


def run(options: argparse.Namespace) -> int:
    from .. import cache
    from ..cache.store import place

    count = cache.export(options.out, options.target, options.format, views=options.views)
    bad = cache.status(options.out).bad
    say(f"wrote {options.target}: {count} pictures")
    if bad:
        note(f"{bad} could not be read and are left out")
    note_unlabelled(place(options.out))
    return 3 if bad else 0
