"""`vfmtok-fast export`."""

from __future__ import annotations

import argparse

from .choices import FORMATS
from .output import note, note_unlabelled, say

# Size of ImageNet's training set.
IMAGENET = 1_281_167
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
    if options.format == "llamagen":
        _note_llamagen(options, count)
    return 3 if bad else 0


def _note_llamagen(options: argparse.Namespace, count: int) -> None:
    """Tell what LlamaGen's loader takes for granted (its dataset/imagenet.py)."""
    from ..cache.format.manifest import read_manifest
    from ..cache.store import place

    views = len(read_manifest(place(options.out)).places_of(options.views, options.out))
    if views > 1 and "flip" not in options.target:
        note(f"LlamaGen draws one of the {views} views only if 'flip' is in TARGET's name: rename")
    if count != IMAGENET:
        note(f"LlamaGen's loader expects {IMAGENET} pictures: change that number to {count} there")
