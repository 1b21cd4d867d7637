"""Report how a run goes: on a progress bar, on stdout, and to TensorBoard."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ..bars import bar
from .output import note, say

# TensorBoard's folder, inside the run's.
EVENTS = "tensorboard"


@contextlib.contextmanager
def reports(
    options: argparse.Namespace, out: Path, done: int, steps: int
) -> Iterator[list[Callable[[dict], None]]]:
    """Yield the functions to call with each line of the log, for the duration of a run."""
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(bar(steps, "step", done=done))

        def show(line: dict) -> None:
            shown.set_postfix_str(told(line), refresh=False)
            shown.update(line["step"] - shown.n)

        found = [show]
        if options.json:
            found.append(_json)
        if options.tensorboard:
            found.append(stack.enter_context(_tensorboard(out, done)))
        yield found


def _json(line: dict) -> None:
    try:
        say(json.dumps(line), flush=True)
    except BrokenPipeError:
        # The reader of our output has closed it, as in `| head`; the run goes on.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def conclude(options: argparse.Namespace, text: str) -> None:
    """Print a line about a run that has ended; with --json, stdout holds only the log's lines."""
    (note if options.json else say)(text)


@contextlib.contextmanager
def _tensorboard(out: Path, done: int) -> Iterator[Callable[[dict], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs pip install 'vfmtok-fast[train]'") from error
    # The steps after the last checkpoint of a killed run are made again.
    with SummaryWriter(str(out / EVENTS), purge_step=done + 1) as writer:

        def write(line: dict) -> None:
            for name, value in line.items():
                if value is not None:
                    writer.add_scalar(name, value, line["step"])
            writer.flush()

        yield write


def told(line: dict) -> str:
    """Format the terms that a person looks at, in one line."""
    names = (
        *("loss", "total", "rec", "perceptual", "semantic", "generator", "grad_norm", "usage"),
        "perplexity",
    )
    words = [f"{name} {line[name]:.3g}" for name in names if line.get(name) is not None]
    if "images_per_second" in line:
        words.append(f"{line['images_per_second']:.1f} img/s")
    if "tokens_per_second" in line:
        words.append(f"{line['tokens_per_second']:.3g} tokens/s")
    stages = ("data", "codes", "encode", "decode", "discriminator")
    shares = {"mfu": line.get("mfu")} | {name: line.get(f"{name}_share") for name in stages}
    words += [f"{name} {share:.0%}" for name, share in shares.items() if share is not None]
    return ", ".join(words)
