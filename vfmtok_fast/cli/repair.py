"""`vfmtok-fast repair`."""

from __future__ import annotations

import argparse

from .models import add_input_option, add_tokenizer_options, check_input, load_tokenizer, policy
from .output import note, say

SUMMARY = "tokenise again the shards of a cache that verify finds damaged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", help="what the cache was made from")
    add_input_option(parser)
    parser.add_argument("out", metavar="CACHE", help="the cache's folder or URL")
    parser.add_argument("--workers", type=int, help="threads that read pictures")
    add_tokenizer_options(parser, precision=None)


def run(options: argparse.Namespace) -> int:
    from .. import cache

    manifest = cache.read_manifest(options.out)
    check_input(options, manifest)
    tokenizer = load_tokenizer(options, options.device, manifest)
    with policy(options):
        made = cache.repair(
            options.images,
            options.out,
            tokenizer,
            input_kind=options.input,
            workers=options.workers,
            tell=note,
        )
    found = cache.status(options.out)
    say(f"{options.out}: {found.state}; {made} of {found.shards} shards made again")
    return 3 if found.bad else 0
