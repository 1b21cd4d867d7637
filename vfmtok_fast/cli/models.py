"""The options that name models, and the loading of those models."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from .choices import INPUTS, PRECISIONS, UNTRAINED
from .output import note
from .processes import is_first

if TYPE_CHECKING:
    import torch

    from ..cache.format.manifest import Manifest
    from ..generator import Generator
    from ..tokenizer import VFMTok

UNTRAINED_NOTE = "note: untrained weights; the tokens mean nothing and pictures are noise"


def add_input_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        choices=INPUTS,
        help="what IMAGES is, if that is not clear: class folders, one tar (also a tar of tars, "
        "like ILSVRC2012), WebDataset shards, Parquet with image bytes, the authors' LMDB",
    )


def add_tokenizer_options(
    parser: argparse.ArgumentParser,
    untrained: Sequence[str] = UNTRAINED,
    precisions: Sequence[str] = PRECISIONS,
    precision: str | None = "float32",
) -> None:
    """``precision``: the default; None is that of the cache, see `load_tokenizer`."""
    group = parser.add_argument_group(
        "model", "by default the authors' tokenizer and DINOv2, downloaded once"
    )
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--model", help="a folder made by convert or training, a hub repo with its files, or emoji"
    )
    source.add_argument("--tokenizer", metavar="FILE", help="the authors' vfmtok-tokenizer.pt")
    source.add_argument(
        "--untrained", choices=untrained, help="random weights: runs, but the results mean nothing"
    )
    group.add_argument("--backbone", metavar="FILE", help="with --tokenizer: DINOv2's own file")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    mixed = "in half precision, mixed changes the fewest; " if "mixed" in precisions else ""
    group.add_argument(
        "--precision",
        choices=precisions,
        default=precision,
        help=f"precision to compute in; all but float32 change some tokens; {mixed}"
        f"({precision or 'as the cache was made'})",
    )
    group.add_argument("--dtype", type=_renamed, help=argparse.SUPPRESS)
    group.add_argument(
        "--no-fast", dest="fast", action="store_false", help="use the reference everywhere"
    )


def _renamed(value: str) -> str:
    raise argparse.ArgumentTypeError(f"renamed to --precision: use --precision {value}")


def check_input(options: argparse.Namespace, manifest: Manifest) -> None:
    """Check that the cache's input exists, before the model, which may have to be downloaded.

    Also check that the authors' tokenizer, the default, can have made the cache.
    """
    from ..cache.format.index import INDEX
    from ..cache.sources import open_again
    from ..cache.store import place
    from ..tokenizer import VFMTokConfig

    theirs = VFMTokConfig()
    made = (manifest.image_size, manifest.num_tokens, manifest.codebook_size)
    if made != (theirs.image_size, theirs.num_regions, theirs.codebook_size) and not (
        options.model or options.tokenizer or options.untrained
    ):
        raise ValueError(
            f"{options.out}: {made[1]} tokens of {made[2]} from {made[0]} pixels are not from the "
            "authors' tokenizer; name the one that made them with --model"
        )
    open_again(options.images, place(options.out) / INDEX, options.input)


def policy(options: argparse.Namespace) -> AbstractContextManager:
    """Return a context that enables the fast implementations, unless --no-fast was given."""
    from .. import switch

    # Shown as they occur, they would break up the progress bar.
    warnings.simplefilter("ignore", switch.FallbackWarning)
    return _telling(options) if options.fast else contextlib.nullcontext()


@contextlib.contextmanager
def _telling(options: argparse.Namespace) -> Iterator[None]:
    """Enable them for a block; at its end, print what fell back, each once per command."""
    from .. import switch

    with switch.enable():
        yield
        ops = switch.status().ops.items() if is_first() else ()
        found = [f"note: {name} was not fast: {why}" for name, op in ops for why in op.fallbacks]
    told = vars(options).setdefault("told", set())
    for line in found:
        if line not in told:
            told.add(line)
            note(line)


def _compute_as_cached(options: argparse.Namespace, manifest: Manifest) -> None:
    made = manifest.covers["dtype"]
    # Another tokenizer's dtype may have no name here; the mismatch is then an error.
    options.precision = made if made in PRECISIONS else "float32"
    if options.precision not in ("float32", "tf32"):
        # In half precision the fast ops round differently, so the manifest names them.
        options.fast &= "fast_ops" in manifest.covers


def load_tokenizer(
    options: argparse.Namespace, device: str | None, manifest: Manifest | None = None
) -> VFMTok:
    """Load what the options name; without --precision, as the cache of ``manifest`` was made."""
    from .. import checkpoint, untrained
    from ..tokenizer import VFMTok

    if options.backbone is not None and options.tokenizer is None:
        raise ValueError("--backbone needs --tokenizer")
    if options.precision is None:
        _compute_as_cached(options, manifest)
    if options.untrained is not None:
        note(UNTRAINED_NOTE)
        model = untrained.untrained_tokenizer(options.untrained)
    elif options.model is not None:
        model = VFMTok.from_pretrained(options.model)
    else:
        file = options.tokenizer or checkpoint.fetch_official("tokenizer", "--tokenizer")
        model = VFMTok.from_official(file, options.backbone)
    model = _moved(model.set_precision(options.precision), device)
    if options.precision == "tf32" and model.device.type == "cpu":
        note("note: a CPU has no TF32; it computes in float32, and a cache records tf32")
    return model


def load_gpt(options: argparse.Namespace, device: str | None) -> Generator:
    import torch

    from .. import untrained
    from ..generator import load_generator

    if options.untrained is not None:
        if options.gpt is not None:
            raise ValueError("--untrained brings its own generator; leave out --gpt")
        gpt = untrained.untrained_gpt(options.untrained)
    elif options.gpt is None:
        raise ValueError(
            "--gpt must name the generator: a folder made by `vfmtok-fast convert GPT-L FOLDER`, "
            "the model folder of a train-gpt run, or emoji, which comes with the package"
        )
    else:
        gpt = load_generator(options.gpt)
    # The generator has no TF32 mode of its own.
    dtype = "float32" if options.precision == "tf32" else options.precision
    return _moved(gpt.to(getattr(torch, dtype)), device)


def _moved(model: torch.nn.Module, name: str | None) -> torch.nn.Module:
    """Move the model to a device, in eval mode."""
    return model.eval().to(checked_device(name))


def check_seed(seed: int | None) -> None:
    """Require a seed that torch's generators accept."""
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ValueError(f"--seed must be in [-2^63, 2^64), got {seed}")


def checked_device(name: str | None) -> torch.device:
    """Return the named device, for None a GPU if there is one; ValueError if it does not exist."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices")
    return device
