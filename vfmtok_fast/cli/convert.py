"""`vfmtok-fast convert`."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from .choices import CONVERTED, OFFICIAL_REPO
from .output import local_path, say

SUMMARY = "convert one of the authors' files into a folder that all commands read"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=CONVERTED, metavar="WHAT", help=", ".join(CONVERTED))
    parser.add_argument("out", metavar="OUT", help="a new or empty folder")
    parser.add_argument(
        "--file",
        help=f"the authors' file; by default, but for RAR, it is downloaded from {OFFICIAL_REPO}",
    )
    parser.add_argument(
        "--backbone",
        help="for tokenizer: dinov2_vitl14_reg4_pretrain.pth; by default it is taken from the file "
        "or downloaded",
    )
    parser.add_argument(
        "--config", help="JSON file with config fields, if they differ from the release's"
    )


def run(options: argparse.Namespace) -> int:
    from .. import checkpoint
    from ..generator import GPT, RAR
    from ..temporary import is_temporary
    from ..tokenizer import VFMTok

    # Follow a link to its target, which may be a mount or the current folder.
    out = Path(os.path.realpath(local_path(options.out)))  # Path.resolve raises on link loops.
    # The remains of a killed convert do not count; save_pretrained removes them.
    if out.exists() and not (
        out.is_dir() and all(is_temporary(path.name) for path in out.iterdir())
    ):
        raise FileExistsError(f"{out} is not an empty folder; choose a new one")
    if options.backbone is not None and options.what != "tokenizer":
        raise ValueError("--backbone is only for the tokenizer")
    config = None
    if options.config is not None:
        config = read_config(local_path(options.config))
    if options.what == "RAR" and options.file is None:
        raise ValueError("--file must name the .safetensors file of the authors' RAR")
    file = options.file or checkpoint.fetch_official(options.what, "--file")
    if options.what == "tokenizer":
        model = VFMTok.from_official(file, options.backbone, config)
    elif options.what == "RAR":
        model = RAR.from_official(file, config)
    else:
        model = GPT.from_official(file, config or options.what)
    model.save_pretrained(out)
    say(f"wrote {out}/config.json and {out}/model.safetensors")
    return 0


def read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold one JSON object of config fields")
    return config
