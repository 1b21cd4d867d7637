"""`vfmtok-fast reconstruct`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .models import add_tokenizer_options, load_tokenizer, policy
from .output import local_path, note, say, write_png

SUMMARY = "draw photo | reconstruction | where the regions look"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", help="a picture, or a folder of them")
    parser.add_argument("out", metavar="OUT.png", help="the picture to write")
    parser.add_argument("--limit", type=int, default=8, help="most pictures to draw (%(default)s)")
    parser.add_argument("--regions", type=int, default=5, help="regions to draw (%(default)s)")
    add_tokenizer_options(parser)


def run(options: argparse.Namespace) -> int:
    import torch

    from .. import images
    from ..cache.sources.base import NOT_UTF8, REASONS
    from ..visualize import reconstruction_grid

    out = local_path(options.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"the name of the picture must end in .png, got {out}")
    if out.exists():  # It may be a photo, as in `reconstruct *.png`.
        raise FileExistsError(f"{out} already exists; choose another name")
    if options.limit < 1 or options.regions < 1:
        raise ValueError("--limit and --regions must be at least 1")
    photos = _photos(local_path(options.images), options.limit)
    tokenizer = load_tokenizer(options, options.device)
    size = tokenizer.config.image_size
    crops = []
    for path, length in photos:
        if length == NOT_UTF8:
            note(f"left out: {path}: {REASONS[length]}")
            continue
        try:
            crops.append(images.load_images([path], size))
        except OSError as error:
            note(f"left out: {path}: {error.strerror}")
        except ValueError as error:
            note(f"left out: {error}")
    if not crops:
        raise ValueError(f"{options.images}: no picture could be read")
    with policy(options):
        regions = min(options.regions, tokenizer.config.num_regions)
        grid = reconstruction_grid(tokenizer, torch.cat(crops), regions)
    write_png(out, grid)
    say(f"wrote {out}: photo | reconstruction | where {regions} regions look")
    return 3 if len(crops) < len(photos) else 0


def _photos(path: Path, limit: int) -> list[tuple[Path, int]]:
    """Return some images, each with its size in bytes or why there is none."""
    from ..cache.sources.folder import walk

    if path.is_file():
        return [(path, path.stat().st_size)]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such picture or folder")
    found = [(path / name, size) for name, size in walk(path)]
    if not found:
        raise ValueError(f"{path}: no pictures in this folder")
    # Spread over the folder, so that not all come from its first class.
    limit = min(limit, len(found))
    return [found[number * len(found) // limit] for number in range(limit)]
