"""The options of `vfmtok-fast evaluate`."""

from __future__ import annotations

import argparse

from .cache import add_choices
from .choices import GENERATION, LABELS, PRECISIONS, PROBED, PROBES, RECONSTRUCTION
from .models import add_input_option, add_tokenizer_options
from .sample import GPT_HELP, add_sampling


def _add_common(parser: argparse.ArgumentParser, num: str) -> None:
    parser.add_argument("--num", type=int, help=f"number of pictures; {num}")
    parser.add_argument("--size", type=int, help="pixels per side at which to compare them (256)")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures (%(default)s)")


def _add_inception(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--inception",
        metavar="FILE",
        help="weights-inception-2015-12-05-6726825d.pth, as torch-fidelity publishes it; without "
        "it, random weights",
    )


def _add_pictures(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", help="class folders of pictures, or archives")
    parser.add_argument("--workers", type=int, default=4, help="threads that read (%(default)s)")
    add_input_option(parser)
    add_choices(parser)


def _add_out(parser: argparse.ArgumentParser) -> None:
    what = parser.prog.split()[-1]
    parser.add_argument(
        "--out", metavar="FILE", default=f"evaluate-{what}.json", help="(%(default)s)"
    )


def add_reconstruction(parser: argparse.ArgumentParser) -> None:
    _add_pictures(parser)
    _add_common(parser, "50000 in the protocols")
    _add_out(parser)
    parser.add_argument(
        "--protocol", choices=RECONSTRUCTION, default=RECONSTRUCTION[0], help="(%(default)s)"
    )
    parser.add_argument("--vgg16", metavar="FILE", help="torchvision's: adds LPIPS")
    parser.add_argument(
        "--lpips-linear", metavar="FILE", help="lpips' vgg.pth; default: the installed package's"
    )
    inception = parser.add_mutually_exclusive_group()
    _add_inception(inception)
    inception.add_argument("--no-inception", action="store_true", help="no rFID and rIS")
    add_tokenizer_options(parser)


def _add_against(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference",
        metavar="FILE.npz",
        required=True,
        help="VIRTUAL_imagenet256_labeled.npz of ADM, or one of your own: arr_0, or mu and sigma",
    )
    parser.add_argument(
        "--protocol", choices=GENERATION, default=GENERATION[0], help="(%(default)s)"
    )
    _add_inception(parser)


def add_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("samples", metavar="SAMPLES", help="an .npz, or a folder made by sample")
    _add_against(parser)
    _add_common(parser, "50000 in the protocols")
    _add_out(parser)
    parser.add_argument("--no-labels", action="store_true", help="the file has no labels (arr_1)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")


def add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder for samples, sweep.json and sweep.png")
    parser.add_argument("--gpt", help=GPT_HELP)
    parser.add_argument(
        "--cfg-scale",
        type=float,
        nargs="+",
        default=[1.0, 1.25, 1.5],
        help="guidance scales; place it after OUT, or before another option (1.0 1.25 1.5)",
    )
    add_sampling(parser)
    parser.add_argument(
        "--labels", choices=LABELS, default="balanced", help="random: as the authors (%(default)s)"
    )
    _add_against(parser)
    _add_common(parser, "50000 in the protocols")
    add_tokenizer_options(parser, precisions=[name for name in PRECISIONS if name != "mixed"])


def add_probe(parser: argparse.ArgumentParser) -> None:
    _add_pictures(parser)
    parser.add_argument("--test", metavar="IMAGES", help="other pictures of the same classes")
    parser.add_argument("--features", choices=PROBED, default=PROBED[0], help="(%(default)s)")
    parser.add_argument("--protocol", choices=PROBES, default=PROBES[0], help="(%(default)s)")
    parser.add_argument("--epochs", type=int, help="of the linear probe (90)")
    parser.add_argument("--seed", type=int, help="of the linear probe (0)")
    parser.add_argument("--num", type=int, help="training pictures, evenly spaced; default: all")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures (%(default)s)")
    _add_out(parser)
    add_tokenizer_options(parser)
