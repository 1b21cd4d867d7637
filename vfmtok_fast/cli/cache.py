"""`vfmtok-fast cache`."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import time
import warnings
from typing import TYPE_CHECKING, Any

from .choices import VIEWS
from .models import add_input_option, add_tokenizer_options, load_tokenizer, policy
from .output import note, note_unlabelled, say
from .processes import among_processes, exit_code

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..cache import CacheSpec, Progress, Summary
    from ..cache.sources import Source
    from ..cache.store import Place

# Most names that a note lists.
MOST_NAMES = 10
SUMMARY = "tokenise a folder of images into a token cache, or resume one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", help="class folders of pictures, or archives")
    add_input_option(parser)
    add_choices(parser)
    parser.add_argument("out", metavar="OUT", help="the cache: a new folder, or one to resume")
    parser.add_argument(
        "--views",
        nargs="+",
        default=["center"],
        metavar="VIEW",
        help=f"any of {', '.join(VIEWS)}; random-0..7 for eight; place it after OUT, or before "
        "another option (center)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of random crops (%(default)s)")
    parser.add_argument(
        "--batch-size", type=int, help="views at a time; by default 64 on a GPU, 4 on a CPU"
    )
    parser.add_argument(
        "--shard-size", type=int, default=8192, help="pictures per shard file (%(default)s)"
    )
    parser.add_argument("--max-bad", type=int, help="stop if more pictures than this are bad")
    parser.add_argument("--workers", type=int, help="threads that read pictures")
    parser.add_argument(
        "--extend",
        action="store_true",
        help="add pictures that are new since the cache was made (refused otherwise)",
    )
    parser.add_argument(
        "--hash",
        action="store_true",
        help="store each picture's SHA-256, to notice changes that keep the size; reads all "
        "pictures first",
    )
    parser.add_argument(
        "--shard-range",
        metavar="A:B",
        help="only the shards A to B-1, for batch systems; under torchrun the processes share the "
        "shards by themselves",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="local: this process, or those of torchrun; ray: actors on the cluster of RAY_ADDRESS "
        "or of this machine (%(default)s)",
    )
    parser.add_argument(
        "--actors", type=int, help="with --engine ray: number of actors; one per GPU by default"
    )
    parser.add_argument(
        "--json", action="store_true", help="print progress and result as lines of JSON"
    )
    add_tokenizer_options(parser)


def add_choices(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which part of the input to take")
    group.add_argument(
        "--split", metavar="NAME", help="only files or folders of this split, such as train"
    )
    group.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="only files that match, by their own name or a folder's, or with slashes by their "
        "path; may be repeated",
    )
    group.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="no files that match"
    )
    group.add_argument(
        "--image-column", metavar="NAME", help="Parquet column of the pictures, if not clear"
    )
    group.add_argument(
        "--label-column",
        metavar="NAME",
        help="Parquet column of the labels, if not clear; none: no labels",
    )


def included(options: argparse.Namespace) -> tuple[str, ...]:
    from ..cache.sources.choice import split_patterns

    if options.split is None:
        return tuple(options.include)
    if options.include:
        raise ValueError("--split implies its own --include; give only one of the two")
    return split_patterns(options.split)


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the options of `add_choices` say, as arguments of `open_source`."""
    return {
        "include": included(options), "exclude": options.exclude,
        "image_column": options.image_column, "label_column": options.label_column,
    }  # fmt: skip


def open_input(options: argparse.Namespace, images: str) -> Source:
    """Open the images as the options of `add_input_option` and `add_choices` say."""
    from ..cache.sources import open_source

    return open_source(images, options.input, **chosen(options))


def run(options: argparse.Namespace) -> int:
    from ..cache import CacheSpec

    # Before loading the model, which may have to be downloaded.
    spec = CacheSpec(
        input_kind=options.input, views=options.views, seed=options.seed,
        batch_size=options.batch_size, shard_size=options.shard_size, workers=options.workers,
        extend=options.extend, hashed=options.hash, **chosen(options),
    )  # fmt: skip
    spec.open(options.images)
    progress = _json_lines() if options.json else True
    if options.engine == "ray":
        rank, summary = 0, _on_ray(options, spec, progress)
    else:
        rank, summary = _here(options, spec, progress)
    _tell(summary, options.json, rank)
    return exit_code(summary.exit_code)


def _here(
    options: argparse.Namespace, spec: CacheSpec, progress: bool | Callable
) -> tuple[int, Summary]:
    from .. import cache

    if options.actors is not None:
        raise ValueError("--actors needs --engine ray")
    rank, world_size, device = among_processes(options.device)
    shard_range = _shard_range(options.shard_range)
    tokenizer = load_tokenizer(options, device)
    with policy(options), _notes():
        summary = cache.build(
            options.images, options.out, tokenizer, spec, max_bad=options.max_bad, rank=rank,
            world_size=world_size, shard_range=shard_range,
            progress=progress if rank == 0 else False,
        )  # fmt: skip
    return rank, summary


def _on_ray(options: argparse.Namespace, spec: CacheSpec, progress: bool | Callable) -> Summary:
    from .. import cache

    if options.shard_range is not None:
        raise ValueError("--shard-range is for batch systems; Ray hands out the shards by itself")
    if among_processes("cpu").world_size != 1:
        raise ValueError("--engine ray must be started once, not by torchrun or srun")
    # The actors hold the model; this process only checks its weights and sends it.
    tokenizer = load_tokenizer(options, "cpu")
    with policy(options), _notes():
        return cache.build_on_ray(
            options.images, options.out, tokenizer, spec, max_bad=options.max_bad,
            actors=options.actors, device=options.device, progress=progress,
        )  # fmt: skip


def _tell(summary: Summary, as_json: bool, rank: int) -> None:
    state = "incomplete" if summary.missing else "complete"
    if as_json:
        from ..cache import read_manifest

        result = {"state": state, "rank": rank, **vars(summary), "out": str(summary.out)}
        result["classes"] = len(read_manifest(summary.out).classes)
        say(json.dumps(result | {"seconds": round(summary.seconds, 3)}))
        return
    if rank:
        return
    rate = f", {summary.encoded / summary.seconds:.1f} img/s" if summary.encoded else ""
    still = f" ({summary.missing} shards are still missing)" if summary.missing else ""
    say(
        f"{summary.out}: {state}{still}; {summary.images} pictures in {summary.shards} shards, "
        f"{summary.encoded} encoded now in {summary.seconds:.1f} s{rate}"
    )
    _tell_classes(summary.out)
    if summary.bad:
        note(f"{summary.bad} could not be read: see {summary.out}/quarantine/")
    note_unlabelled(summary.out)


def _tell_classes(out: Place) -> None:
    """Print how many classes there are, and name those without an image, which may be a mistake."""
    from .. import cache
    from ..cache.format.index import INDEX, used_labels

    classes, used = cache.read_manifest(out).classes, used_labels(out / INDEX)
    say(f"classes: {len(classes)}")
    empty = [name for number, name in enumerate(classes) if number not in used]
    if empty:
        more = f" and {len(empty) - MOST_NAMES} more" if len(empty) > MOST_NAMES else ""
        note(
            f"note: {len(empty)} of {len(classes)} classes have no picture: "
            f"{', '.join(empty[:MOST_NAMES])}{more}"
        )


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Print what an input's listing passed over, in a line on stderr."""
    from ..cache.sources.base import LeftOutWarning

    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(message: Warning, category: type[Warning], *place: object) -> None:
            if issubclass(category, LeftOutWarning):
                note(f"note: {message}")
            else:
                show(message, category, *place)

        warnings.simplefilter("always", LeftOutWarning)
        warnings.showwarning = tell
        yield


def _json_lines() -> Callable[[Progress], None]:
    """Return a progress function that prints at most one line of JSON per second."""
    last = 0.0

    def report(state: Progress) -> None:
        nonlocal last
        if time.monotonic() - last < 1:
            return
        last = time.monotonic()
        values = {**vars(state), "eta": state.eta}
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        say(json.dumps({"state": "encoding", **rounded}), flush=True)

    return report


def _shard_range(text: str | None) -> tuple[int, int | None] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+):([0-9]*)", text)
    if match is None:
        raise ValueError(f"--shard-range must be A:B, as in 0:40 or 40:, got {text!r}")
    return int(match[1]), int(match[2]) if match[2] else None
