"""`vfmtok-fast sample`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..bars import bar
from .choices import PRECISIONS
from .models import add_tokenizer_options, load_gpt, load_tokenizer, policy
from .output import local_path, say, write_png
from .processes import among_processes

if TYPE_CHECKING:
    from ..generator import Generator
    from ..sample_folder import Job
    from ..tokenizer import VFMTok

GPT_HELP = (
    "generator: a folder made by convert, the model folder of a train-gpt run, a hub repo, or emoji"
)
SUMMARY = "generate new images: OUT/samples.npz and a grid; resumes in shards of 64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write to")
    parser.add_argument("--gpt", help=GPT_HELP)
    parser.add_argument("--num", type=int, default=16, help="number of images (%(default)s)")
    parser.add_argument(
        "--extend", action="store_true", help="OUT holds fewer images of this kind: add the others"
    )
    parser.add_argument(
        "--classes",
        type=int,
        nargs="+",
        metavar="ID",
        help="class ids, used in turn; place it after OUT, or before another option (all)",
    )
    parser.add_argument(
        "--batch-size", type=int, help="images generated at a time; by default the fastest"
    )
    parser.add_argument(
        "--kv-int8", action="store_true", help="keep keys and values in 8 bits: half the memory"
    )
    parser.add_argument("--size", type=int, default=256, help="pixels per side (%(default)s)")
    parser.add_argument(
        "--cfg-scale",
        type=float,
        default=1.0,
        help="guidance scale; 1: none, 0: whatever the class (RAR's authors take 0 for none)",
    )
    parser.add_argument("--greedy", action="store_true", help="take the likeliest code each time")
    add_sampling(parser)
    # Mixed precision is for encoding only.
    add_tokenizer_options(parser, precisions=[name for name in PRECISIONS if name != "mixed"])


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the sampling options that do not depend on the guidance scale."""
    parser.add_argument(
        "--cfg-interval", type=int, default=-1, help="guide decode steps 0..N only; -1: all"
    )
    parser.add_argument(
        "--cfg-power",
        type=float,
        help="let the scale grow from 1 along a cosine of this power, for RAR (constant)",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="divides the logits (%(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="0: all codes")
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="keep this much probability; 1: all codes"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")


def run(options: argparse.Namespace) -> int:
    import torch

    from .. import images, sample_folder
    from ..generator import Sampling

    batch_size = 1 if options.batch_size is None else options.batch_size
    if min(options.num, batch_size, options.size) < 1:
        raise ValueError("--num, --batch-size and --size must be at least 1")
    out = local_path(options.out)
    if out.suffix.lower() in (".png", ".jpg", ".jpeg", ".npz"):
        raise ValueError(f"OUT must be a folder, for samples.png and samples.npz, got {out}")
    rank, world_size, device = among_processes(options.device)
    gpt, tokenizer = load_gpt(options, device), load_tokenizer(options, device)
    check_together(gpt, tokenizer)
    count = gpt.config.num_classes
    if wrong := [number for number in options.classes or () if not 0 <= number < count]:
        raise ValueError(f"--classes must be in [0, {count}), got {wrong[0]}")
    classes = torch.tensor(options.classes or range(count))
    names = ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p", "greedy", "seed")
    settings = {name: getattr(options, name) for name in names} | growing(options)
    # Everything is checked before the long work, and before anything is written.
    Sampling(**settings).check()
    kv_dtype = torch.int8 if options.kv_int8 else None
    class_ids = classes[torch.arange(options.num) % len(classes)]
    job = sample_folder.Job(gpt, tokenizer, out, class_ids, options.size, settings, kv_dtype)
    with policy(options):
        sample_folder.prepare(job, extend=options.extend)
    # By shard number: a process that starts late sees fewer left, and would split them differently.
    mine = [number for number in sample_folder.pending(job) if number % world_size == rank]
    count = fill(options, job, mine, options.batch_size, hidden=rank > 0)
    if not sample_folder.finish(job):
        left = len(sample_folder.pending(job))
        say(f"{job.out}: {count} images made now; {left} shards are still missing")
        return 0
    shown = next(sample_folder.shards_of(job))
    write_png(job.out / "samples.png", images.image_grid(shown, int(len(shown) ** 0.5)))
    if rank == 0:
        say(f"wrote {job.out}/samples.png ({len(shown)}) and samples.npz ({options.num} images)")
    return 0


def growing(options: argparse.Namespace) -> dict[str, float]:
    """The setting of a growing scale; none without one, as in folders made before there was one."""
    return {} if options.cfg_power is None else {"cfg_power": options.cfg_power}


def check_together(gpt: Generator, tokenizer: VFMTok) -> None:
    """Require that the tokenizer can decode what the generator makes."""
    if gpt.config.block_size != tokenizer.config.num_regions or (
        gpt.config.vocab_size > tokenizer.config.codebook_size
    ):
        raise ValueError(
            f"the generator makes {gpt.config.block_size} codes of {gpt.config.vocab_size}; the "
            f"tokenizer decodes {tokenizer.config.num_regions} of {tokenizer.config.codebook_size}"
        )


def fill(
    options: argparse.Namespace,
    job: Job,
    numbers: list[int],
    batch_size: int | None,
    hidden: bool = False,
) -> int:
    """Make some shards of a prepared folder with a progress bar; return their image count."""
    from .. import sample_folder

    count = sum(len(job.rows(number)) for number in numbers)
    with policy(options), bar(count, "img", "sample", hidden=hidden) as shown:

        def generating(done: int, codes: int) -> None:
            shown.set_postfix_str(f"codes {done / codes:.0%}", refresh=False)
            shown.update(0)  # Redraws the bar, at its usual interval.

        sample_folder.make_shards(job, numbers, batch_size, shown.update, generating)
    return count
