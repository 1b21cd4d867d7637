"""`vfmtok-fast verify`."""

from __future__ import annotations

import argparse

from .models import add_input_option, add_tokenizer_options, check_input, load_tokenizer, policy
from .output import note, say

SUMMARY = "check every byte of a cache; with --images, tokenise a sample of it again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="CACHE", help="the cache's folder or URL")
    parser.add_argument("--images", help="the pictures' folder or archive: tokenise a sample again")
    add_input_option(parser)
    parser.add_argument("--sample", type=int, help="with --images: how many pictures (64)")
    parser.add_argument(
        "--sheet",
        metavar="OUT.png",
        help="with --images: draw some pictures, each next to what its tokens decode to",
    )
    add_tokenizer_options(parser, precision=None)


def run(options: argparse.Namespace) -> int:
    from .. import cache
    from ..cache.store import place

    if options.sheet is not None:
        sheet = place(options.sheet)
        if not sheet.name.lower().endswith(".png"):
            raise ValueError(f"--sheet: the name of the picture must end in .png, got {sheet}")
        if not options.images:
            raise ValueError("--sheet needs --images, the pictures to draw")
        if sheet.exists():
            raise FileExistsError(f"--sheet: {sheet} already exists; choose another name")
    if options.sample is not None and not options.images:
        raise ValueError("--sample needs --images, the pictures to tokenise again")
    manifest = cache.read_manifest(options.out)
    if options.images:
        check_input(options, manifest)
    chosen = options.model or options.tokenizer or options.untrained
    tokenizer = None
    if options.images or chosen:
        tokenizer = load_tokenizer(options, options.device, manifest)
    with policy(options):
        report = cache.verify(
            options.out,
            tokenizer,
            options.images,
            input_kind=options.input,
            sample=64 if options.sample is None else options.sample,
            sheet=options.sheet,
        )
    for problem in report.problems:
        note(problem)
    again = ""
    if report.agreement is not None:
        again = f"; {report.sampled} encoded again, {report.agreement:.4%} of tokens agree"
    count = len(report.problems)
    verdict = f"{count} problem{'s' * (count > 1)}" if count else "sound"
    say(
        f"{options.out}: {verdict}; {report.images} pictures in {report.shards} shards, "
        f"{report.bad} could not be read{again}"
    )
    if options.sheet is not None and sheet.exists():
        say(f"wrote {options.sheet}: picture | what its tokens decode to")
    if not report.ok:
        return 1
    return 3 if report.bad else 0
