"""The command line: ``vfmtok-fast``, also ``python -m vfmtok_fast``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

import torch

from . import commands
from .cache import TooManyBadImages, known_views
from .cache.export import FORMATS
from .cache.sources import KINDS
from .checkpoint import OFFICIAL_FILES, OFFICIAL_REPO
from .generator.config import PRESETS
from .switch import FallbackWarning
from .untrained import GPTS, TOKENIZERS

EXIT_CODES = """exit codes: 0 done; 1 verify found a problem, or status: not complete; 2 wrong input
or an error; 3 cache complete, but some pictures could not be read; 4 more of them than --max-bad;
130 interrupted, 143 terminated (a cache goes on where it stopped)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; errors are one line on stderr."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    # `doctor` and `status()` tell what runs fast; here the warnings would drown the progress.
    warnings.simplefilter("ignore", FallbackWarning)
    try:
        return options.run(options)
    except BrokenPipeError:
        # Who reads our output has seen enough, as in `| head`. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except TooManyBadImages as error:
        return _fail(options, error, error.exit_code)
    except (ValueError, TypeError, OSError) as error:
        return _fail(options, error, 2)
    except torch.OutOfMemoryError as error:
        advice = "a smaller --batch-size needs less; a cache with another one is a new folder"
        return _fail(options, f"{error}; {advice}", 2)
    except MemoryError as error:
        return _fail(options, f"out of memory ({error})", 2)
    except KeyboardInterrupt:
        goes_on = options.command in ("cache", "repair", "sample")
        resumes = "; run it again to go on where it stopped" if goes_on else ""
        return _fail(options, f"interrupted{resumes}", 130)


def _fail(options: argparse.Namespace, error: Exception | str, code: int) -> int:
    text = " ".join(str(error).split()).removeprefix(f"{options.command}: ")
    print(f"vfmtok-fast {options.command}: {text}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vfmtok-fast",
        description="VFMTok: images to 256 tokens, tokens to images, and new images.",
        epilog=EXIT_CODES,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=summary, description=summary, epilog=EXIT_CODES)
        sub.set_defaults(run=getattr(commands, name))
        return sub

    sub = command("convert", "turn one of the authors' files into a folder that everything reads")
    sub.add_argument("what", choices=OFFICIAL_FILES, metavar="WHAT", help=", ".join(OFFICIAL_FILES))
    sub.add_argument("out", metavar="OUT", help="a new or empty folder")
    sub.add_argument(
        "--file", help=f"the authors' file; left out, it is downloaded from {OFFICIAL_REPO}"
    )
    sub.add_argument(
        "--backbone",
        help="tokenizer: dinov2_vitl14_reg4_pretrain.pth; left out, it is taken from the file or "
        "downloaded",
    )
    sub.add_argument(
        "--config", help="JSON file with config fields, where they are not the release's"
    )

    sub = command("cache", "tokenise a folder of images into a token cache, or go on with one")
    sub.add_argument("images", metavar="IMAGES", help="class folders of pictures, or archives")
    _input_option(sub)
    _choice_options(sub)
    sub.add_argument("out", metavar="OUT", help="the cache: a new folder, or one to go on with")
    sub.add_argument(
        "--views",
        nargs="+",
        default=["center"],
        metavar="VIEW",
        help=f"of {', '.join(known_views())}; random-0..7 for eight (%(default)s)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of random crops (%(default)s)")
    sub.add_argument("--batch-size", type=int, default=16, help="pictures at a time (%(default)s)")
    sub.add_argument("--shard-size", type=int, default=8192, help="pictures a file (%(default)s)")
    sub.add_argument("--max-bad", type=int, help="stop above this many unreadable pictures")
    sub.add_argument("--workers", type=int, help="threads that read pictures")
    sub.add_argument(
        "--extend",
        action="store_true",
        help="add pictures that came since the cache was made (refused otherwise)",
    )
    sub.add_argument(
        "--hash",
        action="store_true",
        help="note each picture's SHA-256, to notice changes that keep the size (reads all first)",
    )
    sub.add_argument(
        "--shard-range",
        metavar="A:B",
        help="only the shards A to B-1, for batch systems; under torchrun the processes share the "
        "shards by themselves",
    )
    sub.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: this process, or those of torchrun; ray: actors on the cluster of RAY_ADDRESS "
        "or of this machine (%(default)s)",
    )
    sub.add_argument(
        "--actors", type=int, help="with --engine ray: how many; one per GPU by default"
    )
    sub.add_argument("--json", action="store_true", help="progress and result as lines of JSON")
    _tokenizer_options(sub)

    sub = command("status", "how far a cache is")
    sub.add_argument("out", metavar="OUT", help="the cache")
    sub.add_argument(
        "--failures", type=int, default=10, help="unreadable pictures to list (%(default)s)"
    )

    sub = command("verify", "check every byte of a cache, and tokenise a sample of it again")
    sub.add_argument("out", metavar="OUT", help="the cache")
    sub.add_argument("--images", help="the pictures' folder or archive: tokenise a sample again")
    _input_option(sub)
    sub.add_argument("--sample", type=int, default=64, help="how many pictures (%(default)s)")
    sub.add_argument(
        "--sheet",
        metavar="OUT.png",
        help="with --images: draw some pictures, each beside what its tokens decode to",
    )
    _tokenizer_options(sub)

    sub = command("repair", "tokenise again the shards of a cache that verify finds damaged")
    sub.add_argument("images", metavar="IMAGES", help="what the cache was made from")
    _input_option(sub)
    sub.add_argument("out", metavar="OUT", help="the cache")
    sub.add_argument("--workers", type=int, help="threads that read pictures")
    _tokenizer_options(sub)

    sub = command("export", "write a cache in the format of another program")
    sub.add_argument("out", metavar="OUT", help="the cache")
    sub.add_argument("target", metavar="TARGET", help="what to write; must not exist")
    sub.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="LlamaGen's folders of .npy, RAR's lines of JSON, or Parquet",
    )
    sub.add_argument("--views", nargs="+", metavar="VIEW", help="of the cache; all by default")

    sub = command("reconstruct", "draw photo | reconstruction | where the regions look")
    sub.add_argument("images", metavar="IMAGES", help="a picture, or a folder of them")
    sub.add_argument("out", metavar="OUT.png", help="the picture to write")
    sub.add_argument("--limit", type=int, default=8, help="pictures at most (%(default)s)")
    sub.add_argument("--regions", type=int, default=5, help="regions to draw (%(default)s)")
    _tokenizer_options(sub)

    sub = command("sample", "generate new images: OUT/samples.npz and a grid; resumes, by 64")
    sub.add_argument("out", metavar="OUT", help="folder to write to")
    sub.add_argument("--gpt", help="generator: a folder made by convert, or a hub repo")
    sub.add_argument("--num", type=int, default=16, help="images (%(default)s)")
    sub.add_argument(
        "--classes", type=int, nargs="+", metavar="ID", help="class ids, in turn; all by default"
    )
    sub.add_argument(
        "--batch-size", type=int, help="images generated at a time; by default what is fastest"
    )
    sub.add_argument(
        "--kv-int8", action="store_true", help="keep keys and values in 8 bits: half the memory"
    )
    sub.add_argument("--size", type=int, default=256, help="pixels a side (%(default)s)")
    sub.add_argument("--cfg-scale", type=float, default=1.0, help="guidance; 1 is none")
    sub.add_argument(
        "--cfg-interval", type=int, default=-1, help="guide decode steps 0..N only; -1: all"
    )
    sub.add_argument("--temperature", type=float, default=1.0)
    sub.add_argument("--top-k", type=int, default=0, help="0: all codes")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--greedy", action="store_true", help="take the likeliest code each time")
    sub.add_argument("--seed", type=int, default=0)
    _tokenizer_options(sub, untrained=sorted({*TOKENIZERS} & {*GPTS}))

    sub = command("tune", "measure the kernels' settings on this GPU, and keep the fastest")
    sub.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        help=f"whose calls: of VFMTok, {', '.join(PRESETS)}; or all (VFMTok GPT-L)",
    )
    sub.add_argument("--ops", nargs="+", metavar="OP", help="only these; all by default")
    sub.add_argument(
        "--seconds", type=float, default=120, help="about how long to go on (%(default)s)"
    )
    sub.add_argument("--device", help="which GPU, such as cuda:1; the first by default")
    sub.add_argument("--out", metavar="FILE", help="another file than the user's table")

    command("doctor", "what is installed, what will run fast here, and why not")
    return parser


def _input_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        choices=KINDS,
        help="what IMAGES is, where that is not plain: class folders, one tar (also of tars, as "
        "ILSVRC2012 comes), WebDataset shards, Parquet with image bytes, the authors' LMDB",
    )


def _choice_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what of the input to take")
    group.add_argument("--split", metavar="NAME", help="only files or folders named so: train")
    group.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="only files that fit, by their own name or a folder's, or with slashes by their path; "
        "may be given again",
    )
    group.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="no files that fit"
    )
    group.add_argument("--image-column", metavar="NAME", help="of Parquet, where not plain")
    group.add_argument(
        "--label-column", metavar="NAME", help="of Parquet, where not plain; none: no labels"
    )


def _tokenizer_options(
    parser: argparse.ArgumentParser, untrained: Sequence[str] = tuple(sorted(TOKENIZERS))
) -> None:
    group = parser.add_argument_group(
        "model", "by default the authors' tokenizer and DINOv2, downloaded once"
    )
    source = group.add_mutually_exclusive_group()
    source.add_argument("--model", help="a folder made by convert, or a hub repo in that format")
    source.add_argument("--tokenizer", metavar="FILE", help="the authors' vfmtok-tokenizer.pt")
    source.add_argument(
        "--untrained", choices=untrained, help="random weights: shows the work, means nothing"
    )
    group.add_argument("--backbone", metavar="FILE", help="with --tokenizer: DINOv2's own file")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights; half precision changes some tokens (%(default)s)",
    )
    group.add_argument(
        "--no-fast", dest="fast", action="store_false", help="take the reference everywhere"
    )
