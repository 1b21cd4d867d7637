"""`vfmtok-fast train-tokenizer`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import add_choices, included
from .choices import UNTRAINED
from .convert import read_config
from .models import add_input_option, policy
from .output import note, say
from .processes import among_processes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from ..tokenizer import VFMTok, VFMTokConfig
    from ..training import (
        LPIPS,
        DinoDiscriminator,
        PatchDiscriminator,
        Pictures,
        Run,
        TokenizerTraining,
    )

SUMMARY = "train a tokenizer on pictures, or go on with a run"
RECIPES = ("vfmtok", "rae")
# The result in the authors' naming, without the backbone, as theirs.
OFFICIAL = "vfmtok-tokenizer.pt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", help="class folders of pictures, or archives")
    parser.add_argument("out", metavar="OUT", help="the run: a new folder, or one to go on with")
    add_input_option(parser)
    add_choices(parser)
    _add_model(parser)
    _add_losses(parser)
    _add_schedule(parser)
    group = parser.add_argument_group("the run")
    group.add_argument("--workers", type=int, default=4, help="threads that read (%(default)s)")
    group.add_argument("--save-every", type=int, default=5000, help="steps (%(default)s)")
    group.add_argument("--keep", type=int, default=3, help="checkpoints that stay (%(default)s)")
    group.add_argument("--log-every", type=int, default=50, help="steps (%(default)s)")
    group.add_argument(
        "--show-every", type=int, default=1000, help="steps between grids; 0: none (%(default)s)"
    )
    group.add_argument("--tensorboard", action="store_true", help="write events into OUT too")
    group.add_argument("--json", action="store_true", help="the log's lines on stdout too")
    group.add_argument(
        "--accept-changes", action="store_true", help="go on with other settings than before"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: two steps of a small model, and what the real one would take",
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", "by default the release's, on DINOv2 ViT-L")
    group.add_argument("--config", metavar="FILE", help="JSON with fields of VFMTokConfig")
    group.add_argument("--size", choices=UNTRAINED, default="full", help="(%(default)s)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--backbone", metavar="FILE", help="DINOv2's file; else it is downloaded")
    source.add_argument(
        "--random-backbone", action="store_true", help="a backbone that has learned nothing"
    )
    source.add_argument("--start-from", metavar="FOLDER", help="a tokenizer to train on")
    group.add_argument(
        "--dropout", type=float, help="of the token decoder's attention (authors: 0.1; here 0)"
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    group.add_argument(
        "--precision",
        choices=("float32", "tf32", "bfloat16"),
        help="by default bfloat16 on a GPU, float32 elsewhere",
    )
    group.add_argument(
        "--no-fast", dest="fast", action="store_false", help="take the reference everywhere"
    )
    group.add_argument(
        "--deterministic", action="store_true", help="the same bits at each run, on a GPU too"
    )


def _add_losses(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("losses")
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        default="vfmtok",
        help="the authors', or RAE's discriminator: later, adaptive, cosine (%(default)s)",
    )
    group.add_argument("--pixel-loss", choices=("l2", "l1"), default="l2", help="(%(default)s)")
    group.add_argument("--vgg16", metavar="FILE", help="torchvision's; else it is downloaded")
    group.add_argument(
        "--lpips-linear", metavar="FILE", help="lpips' vgg.pth; else the installed package's"
    )
    group.add_argument("--lpips-dropout", type=float, default=0.0, help="authors: 0.5 (none)")
    group.add_argument("--no-lpips", action="store_true", help="no perceptual loss")
    group.add_argument(
        "--discriminator",
        choices=("dino", "patch", "none"),
        default="dino",
        help="the authors', which needs --dino-vits16; PatchGAN; or none (%(default)s)",
    )
    group.add_argument(
        "--dino-vits16", metavar="FILE", help="dino_deitsmall16_pretrain.pth, as DINO publishes it"
    )
    group.add_argument("--discriminator-start", type=int, help="step (20000; RAE: epoch 8)")
    group.add_argument("--discriminator-weight", type=float, help="(0.5; RAE: 0.75)")
    group.add_argument(
        "--skip-idle-discriminator",
        action="store_true",
        help="do not run it before its start, as the authors do",
    )


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("steps")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=50, help="(%(default)s)")
    length.add_argument("--steps", type=int, help="instead of epochs")
    group.add_argument("--batch-size", type=int, default=128, help="of all processes (%(default)s)")
    group.add_argument("--micro-batch", type=int, help="pictures at a time, for less memory")
    group.add_argument("--lr", type=float, default=1e-4, help="(%(default)s)")
    group.add_argument("--warmup-epochs", type=float, default=4, help="(%(default)s)")
    group.add_argument("--warmup-steps", type=int, help="instead of epochs")
    group.add_argument("--schedule", choices=("constant", "cosine"), help="(constant; RAE: cosine)")
    group.add_argument("--min-lr", type=float, default=0.0, help="a cosine's end (%(default)s)")
    group.add_argument("--clip", type=float, default=1.0, help="gradient norm (%(default)s)")
    group.add_argument("--ema", type=float, help="decay of the average (0.9999; RAE: 0.9978)")
    group.add_argument(
        "--revive-after",
        type=int,
        metavar="PICTURES",
        help="without use, after which a code starts anew (never, as the authors)",
    )
    group.add_argument("--seed", type=int, default=0, help="of all that is random (%(default)s)")


def run(options: argparse.Namespace) -> int:
    import torch

    from ..cache.store import LocalPlace
    from ..checkpoint import official_tokenizer
    from ..training import Stopped, checkpoints
    from ..training.loop import CHECKPOINTS

    counts = ("batch_size", "workers", "save_every", "keep", "log_every")
    if small := [f"--{name.replace('_', '-')}" for name in counts if getattr(options, name) < 1]:
        raise ValueError(f"{', '.join(small)} must be at least 1")
    if options.deterministic:
        # Without, cuBLAS has no order of sums; it must stand before the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if options.dry_run:
        return _dry_run(options)
    out = Path(options.out).expanduser()
    if out.is_dir() and any(out.iterdir()) and checkpoints.latest(out / CHECKPOINTS) is None:
        raise FileExistsError(f"{out} is neither empty nor a run to go on with; choose a new one")
    rank, world_size, options.device = among_processes(options.device)
    with _together(rank, world_size, options.device), policy(options):
        work = _prepare(options, out, rank, world_size)
        try:
            work.train()
        except Stopped as stopped:
            if rank == 0:
                note(f"vfmtok-fast train-tokenizer: {stopped}; run it again to go on")
            return 128 + stopped.number
    if rank:
        return 0
    trainer, pictures = work.trainer, work.pictures
    trainer.ema.save_pretrained(out / "model")
    with LocalPlace(out / OFFICIAL).writing() as file:
        torch.save({"ema": official_tokenizer(trainer.ema)}, file)
    if pictures.bad:
        note(f"note: {len(pictures.bad)} pictures could not be read; others took their places")
    epochs = trainer.steps / pictures.steps_per_epoch
    say(f"{out}: {trainer.steps} steps, {epochs:.2f} epochs; the tokenizer is {out / 'model'}")
    return 0


@contextlib.contextmanager
def _together(rank: int, world_size: int, device: str | None) -> Iterator[None]:
    """Connect the processes that torchrun or srun has started."""
    if world_size == 1:
        yield
        return
    import torch.distributed as dist

    gpu = device is not None and device.startswith("cuda")
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _prepare(options: argparse.Namespace, out: Path, rank: int, world_size: int) -> Run:
    """What is quick to check comes first."""
    from ..training import Run, TokenizerTrainer

    _check_discriminator(options)
    config = _config(options)
    pictures = _pictures(options, config.image_size, rank, world_size)
    device = _device(options)
    steps, settings = _settings(options, pictures.steps_per_epoch, device)
    lpips, discriminator = _lpips(options), _discriminator(options)
    model = _tokenizer(options, config).to(device)
    trainer = TokenizerTrainer(model, settings, lpips=lpips, discriminator=discriminator)
    names = ("batch_size", "seed", "discriminator", "lpips_dropout")
    arguments = {name: getattr(options, name) for name in names}
    work = Run(
        trainer, pictures, out, steps, save_every=options.save_every, log_every=options.log_every,
        show_every=options.show_every, keep=options.keep,
        arguments=arguments | {"pictures": len(pictures.entries)},
    )  # fmt: skip
    if path := work.resume(changed=options.accept_changes):
        if rank == 0:
            note(f"going on from {path}")
    if rank == 0:
        work.reports = list(_reports(options, out, trainer.steps, steps))
    return work


def _dry_run(options: argparse.Namespace) -> int:
    """The real architecture without memory, and two steps of a small one on the real pictures."""
    import dataclasses

    from ..images import to_float
    from ..tokenizer import VFMTok
    from ..training import DinoDiscriminator, PatchDiscriminator, TokenizerTrainer
    from ..training.estimate import estimate, product_rate
    from ..untrained import TOKENIZERS

    config, device = _config(options), _device(options)
    pictures = _pictures(options, config.image_size)
    steps, settings = _settings(options, pictures.steps_per_epoch, device)
    kinds = {"dino": DinoDiscriminator, "patch": PatchDiscriminator, "none": None}
    found = estimate(config, settings, kinds[options.discriminator])
    rate = product_rate(device, settings.precision)
    each = pictures.steps_per_epoch
    least = found.flops * each * options.batch_size / rate / 3600
    say(f"{len(pictures.entries)} pictures, {each} steps an epoch, {steps} steps in all")
    say(
        f"{found.learned / 1e6:.1f} million weights learn, {found.frozen / 1e6:.1f} million are "
        f"frozen: {found.resting_bytes / 2**30:.2f} GiB before the first picture"
    )
    say(
        f"{found.flops / 1e12:.3g} TFLOP a picture; a matrix product reaches {rate / 1e12:.3g} "
        f"TFLOP/s here ({settings.precision}), so an epoch takes at least {least:.3g} hours "
        "(predicted)"
    )
    size = dataclasses.replace(TOKENIZERS["small"], image_size=config.image_size, grid=config.grid)
    trainer = TokenizerTrainer(
        VFMTok(size).to(device), dataclasses.replace(settings, perceptual_weight=0)
    )
    batches = pictures.batches(0)
    with policy(options):
        for _ in range(2):
            terms = trainer.step(to_float(next(batches).images.to(device)))
            say(f"step {trainer.steps} of a small model: {_told(terms)}")
    batches.close()
    return 0


def _pictures(
    options: argparse.Namespace, size: int, rank: int = 0, world_size: int = 1
) -> Pictures:
    from ..cache.sources import open_source
    from ..training import Pictures

    source = open_source(
        options.images, options.input, include=included(options), exclude=options.exclude,
        image_column=options.image_column, label_column=options.label_column,
    )  # fmt: skip
    return Pictures(
        source, options.batch_size, size=size, seed=options.seed, workers=options.workers,
        rank=rank, world_size=world_size,
    )  # fmt: skip


def _settings(
    options: argparse.Namespace, steps_per_epoch: int, device: torch.device
) -> tuple[int, TokenizerTraining]:
    """How many steps, and how."""
    from ..training import TokenizerTraining, rae

    steps = options.steps or max(1, round(options.epochs * steps_per_epoch))
    warmup = options.warmup_steps
    if warmup is None:
        warmup = round(options.warmup_epochs * steps_per_epoch)
    fields = rae(steps_per_epoch) if options.recipe == "rae" else {}
    same = ("lr", "min_lr", "clip", "micro_batch", "seed", "pixel_loss", "revive_after")
    fields |= {name: getattr(options, name) for name in same}
    fields |= {
        "warmup_steps": warmup, "total_steps": steps,
        "precision": options.precision or ("bfloat16" if device.type == "cuda" else "float32"),
        "perceptual_weight": 0.0 if options.no_lpips else 1.0,
    }  # fmt: skip
    if options.skip_idle_discriminator:
        fields["idle_discriminator"] = False
    for name in ("schedule", "ema", "discriminator_start", "discriminator_weight"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    if options.discriminator_start is not None:
        fields.pop("discriminator_update_start", None)
    return steps, TokenizerTraining(**fields)


def _config(options: argparse.Namespace) -> VFMTokConfig:
    import dataclasses

    from ..configs import config_from_mapping
    from ..tokenizer import VFMTok, VFMTokConfig
    from ..untrained import TOKENIZERS

    if options.start_from is not None:
        config = VFMTok.from_pretrained(options.start_from).config
    elif options.config is not None:
        config = config_from_mapping(VFMTokConfig, read_config(Path(options.config).expanduser()))
    else:
        config = TOKENIZERS[options.size]
    if options.dropout is None:
        return config
    return dataclasses.replace(config, decoder_dropout=options.dropout)


def _tokenizer(options: argparse.Namespace, config: VFMTokConfig) -> VFMTok:
    import torch

    from ..checkpoint import load_backbone
    from ..tokenizer import VFMTok

    if options.start_from is not None:
        return VFMTok.from_pretrained(options.start_from, config=config)
    torch.manual_seed(options.seed)
    model = VFMTok(config)
    if options.random_backbone:
        note("note: a backbone that has learned nothing; for tests only")
        return model
    return load_backbone(model, options.backbone)


def _device(options: argparse.Namespace) -> torch.device:
    import torch

    from .models import checked_device

    return checked_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _lpips(options: argparse.Namespace) -> LPIPS | None:
    from ..training import LPIPS

    if options.no_lpips:
        return None
    return LPIPS.from_files(options.vgg16, options.lpips_linear, options.lpips_dropout)


def _check_discriminator(options: argparse.Namespace) -> None:
    if options.discriminator == "dino" and options.dino_vits16 is None:
        raise ValueError(
            "--discriminator dino needs --dino-vits16 FILE (dino_deitsmall16_pretrain.pth of "
            "facebookresearch/dino); --discriminator patch and none need no file"
        )


def _discriminator(options: argparse.Namespace) -> DinoDiscriminator | PatchDiscriminator | None:
    import torch

    from ..training import DinoDiscriminator, PatchDiscriminator

    torch.manual_seed(options.seed)
    if options.discriminator == "dino":
        return DinoDiscriminator.from_files(options.dino_vits16)
    return PatchDiscriminator() if options.discriminator == "patch" else None


def _reports(
    options: argparse.Namespace, out: Path, done: int, steps: int
) -> Iterator[Callable[[dict], None]]:
    """Who is told of each line of the log."""
    from tqdm import tqdm

    bar = tqdm(total=steps, initial=done, unit="step", disable=None)

    def show(line: dict) -> None:
        bar.set_postfix_str(_told(line))
        bar.update(line["step"] - bar.n)

    yield show
    if options.json:
        yield lambda line: say(json.dumps(line), flush=True)
    if options.tensorboard:
        yield _tensorboard(out)


def _tensorboard(out: Path) -> Callable[[dict], None]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs pip install 'vfmtok-fast[train]'") from error
    writer = SummaryWriter(str(out / "tensorboard"))

    def write(line: dict) -> None:
        for name, value in line.items():
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    return write


def _told(line: dict) -> str:
    """The terms that a person looks at, in a row."""
    names = ("total", "rec", "perceptual", "semantic", "generator", "grad_norm", "usage")
    words = [f"{name} {line[name]:.3g}" for name in names if name in line]
    if "images_per_second" in line:
        words += [f"{line['images_per_second']:.1f} img/s", f"data {line['data_share']:.0%}"]
    return ", ".join(words)
