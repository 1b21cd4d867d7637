"""`vfmtok-fast tune`."""

from __future__ import annotations

import argparse
import sys

from .choices import PRESETS
from .output import local_path, say

SUMMARY = "measure the kernels' settings on this GPU, and keep the fastest"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"models whose calls to measure: any of VFMTok, {', '.join(PRESETS)}; or all "
        "(VFMTok GPT-L)",
    )
    parser.add_argument("--ops", nargs="+", metavar="OP", help="only these ops; all by default")
    parser.add_argument(
        "--seconds", type=float, default=120, help="about how long to measure (%(default)s)"
    )
    parser.add_argument("--device", help="which GPU, such as cuda:1; the first by default")
    parser.add_argument("--out", metavar="FILE", help="file to write instead of the user's table")


def run(options: argparse.Namespace) -> int:
    from .. import tuner

    outcome = tuner.tune(
        options.models,
        options.ops,
        options.seconds,
        device=options.device,
        progress=sys.stderr.isatty(),
        path=None if options.out is None else local_path(options.out),
    )
    for line in str(outcome).splitlines():
        say(line)
    return 0
