"""The command line: ``vfmtok-fast``, also ``python -m vfmtok_fast``; one module per command.

A command has a SUMMARY, `add_arguments` and `run`, which returns an exit code. Modules import slow
dependencies only where they are used, so `--help` does not import torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import is_out_of_memory, one_line
from . import (
    cache,
    convert,
    doctor,
    evaluate,
    export,
    reconstruct,
    repair,
    sample,
    status,
    train_gpt,
    train_tokenizer,
    tune,
    verify,
)
from .output import make_streams_safe, note

COMMANDS = {
    "convert": convert,
    "cache": cache,
    "status": status,
    "verify": verify,
    "repair": repair,
    "export": export,
    "reconstruct": reconstruct,
    "sample": sample,
    "train-tokenizer": train_tokenizer,
    "train-gpt": train_gpt,
    "evaluate": evaluate,
    "tune": tune,
    "doctor": doctor,
}
MOST_CHARACTERS = 1000
# Commands that resume where they stopped.
RESUMING = {"cache", "repair", "sample", "train-tokenizer", "train-gpt"}
EXIT_CODES = """exit codes: 0 done; 1 verify found a problem, status: not complete, or train-gpt
--overfit failed; 2 wrong input or an error; 3 done, but some pictures could not be read (0 in
training, which replaces them by others, and under torchrun, which takes 3 for a crash); 4 more
unreadable pictures than --max-bad; 130 interrupted, 143 terminated (a cache resumes where it
stopped)"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error is one line on stderr."""
    make_streams_safe()
    options = build_parser().parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except BrokenPipeError:
        # The reader of our output has closed it, as in `| head`. Python would complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, TypeError, OSError, MemoryError, RuntimeError) as error:
        text = _explained(error)
        if text is None:
            raise
        return _fail(options, text, getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        resumes = "; run it again to resume where it stopped" if options.command in RESUMING else ""
        return _fail(options, f"interrupted{resumes}", 130)


def _explained(error: Exception) -> str | None:
    """Return an error of the user's or the machine's in one line; None for a bug of ours."""
    text = one_line(error)
    if isinstance(error, MemoryError):
        return f"out of memory ({text})" if str(error) else "out of memory"
    if not isinstance(error, RuntimeError) or hasattr(error, "exit_code"):
        return text
    if is_out_of_memory(error):
        return (
            f"{text}; a smaller --batch-size needs less memory, as does a smaller --micro-batch in "
            "training (a cache keeps the batch size of its first shard)"
        )
    return None


def _fail(options: argparse.Namespace, text: str, code: int) -> int:
    if len(text) > MOST_CHARACTERS:  # For example, all names in a wrong file.
        left = len(text) - MOST_CHARACTERS
        text = f"{text[:MOST_CHARACTERS]} ... ({left} more characters; Python shows them all)"
    note(f"vfmtok-fast {options.command}: {text.removeprefix(f'{options.command}: ')}")
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vfmtok-fast",
        description="VFMTok: images to 256 tokens, tokens to images, and new images.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"vfmtok-fast {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            subparsers.add_parser(
                name, help=command.SUMMARY, description=command.SUMMARY, epilog=EXIT_CODES
            )
        )
    return parser
