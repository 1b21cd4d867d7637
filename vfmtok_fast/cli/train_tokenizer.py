"""`vfmtok-fast train-tokenizer`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from . import training
from .cache import add_choices
from .choices import UNTRAINED
from .convert import read_config
from .models import add_input_option, checked_device
from .output import local_path, note, say
from .training_reports import conclude

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..tokenizer import VFMTok, VFMTokConfig
    from ..training import (
        LPIPS,
        DinoDiscriminator,
        PatchDiscriminator,
        Run,
        TokenizerTraining,
    )

SUMMARY = "train a tokenizer on pictures, or resume a run"
RECIPES = ("vfmtok", "rae")
# File for the result under the authors' names, without the backbone, like theirs.
OFFICIAL = "vfmtok-tokenizer.pt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", metavar="IMAGES", help="class folders of pictures, or archives")
    parser.add_argument("out", metavar="OUT", help="the run: a new folder, or one to resume")
    add_input_option(parser)
    add_choices(parser)
    _add_model(parser)
    _add_losses(parser)
    group = training.add_schedule_options(parser, epochs=50, batch_size=128, warmup_epochs=4)
    group.add_argument("--schedule", choices=("constant", "cosine"), help="(constant; RAE: cosine)")
    group.add_argument("--ema", type=float, help="decay of the EMA (0.9999; RAE: 0.9978)")
    group.add_argument(
        "--revive-after",
        type=int,
        metavar="PICTURES",
        help="reset a code that this many pictures have not used (never, like the authors)",
    )
    training.add_machine_options(parser)
    training.add_run_options(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model", "by default the release's, on DINOv2 ViT-L")
    group.add_argument("--config", metavar="FILE", help="JSON with fields of VFMTokConfig")
    group.add_argument("--size", choices=UNTRAINED, default="full", help="(%(default)s)")
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--backbone", metavar="FILE", help="DINOv2's file; by default it is downloaded"
    )
    source.add_argument(
        "--random-backbone", action="store_true", help="a backbone with random weights"
    )
    source.add_argument("--start-from", metavar="FOLDER", help="a tokenizer to train further")
    group.add_argument(
        "--dropout", type=float, help="dropout in the token decoder's attention (0; authors: 0.1)"
    )


def _add_losses(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("losses")
    group.add_argument(
        "--recipe",
        choices=RECIPES,
        default="vfmtok",
        help="the authors', or RAE's discriminator: late start, adaptive weight, cosine schedule "
        "(%(default)s)",
    )
    group.add_argument("--pixel-loss", choices=("l2", "l1"), default="l2", help="(%(default)s)")
    group.add_argument("--vgg16", metavar="FILE", help="torchvision's; by default it is downloaded")
    group.add_argument(
        "--lpips-linear", metavar="FILE", help="lpips' vgg.pth; default: the installed package's"
    )
    group.add_argument("--lpips-dropout", type=float, default=0.0, help="(none; authors: 0.5)")
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
    group.add_argument(
        "--discriminator-start", type=int, help="step from which it counts (20000; RAE: epoch 8)"
    )
    group.add_argument("--discriminator-weight", type=float, help="(0.5; RAE: 0.75)")
    group.add_argument(
        "--skip-idle-discriminator",
        action="store_true",
        help="do not run it before it starts to learn; the authors do run it",
    )


def run(options: argparse.Namespace) -> int:
    return training.run_to_end(options, _prepare, _dry_run, _finish)


def _finish(options: argparse.Namespace, work: Run, model: VFMTok, rank: int) -> int:
    from ..checkpoint import official_tokenizer

    if rank:
        return 0
    trainer, pictures = work.trainer, work.data
    training.save_official(work.out / OFFICIAL, official_tokenizer(model))
    if pictures.bad:
        path, reason = next(iter(pictures.bad.items()))
        note(
            f"note: {len(pictures.bad)} pictures could not be read, such as {path} ({reason}); "
            "others took their places"
        )
    epochs, folder = trainer.steps / pictures.order.steps_per_epoch, work.out / "model"
    conclude(
        options,
        f"{work.out}: {trainer.steps} steps, {epochs:.2f} epochs; the tokenizer is {folder}",
    )
    return 0


def _prepare(options: argparse.Namespace, out: Path, rank: int, world_size: int) -> Run:
    """Make the run; what is quick to check comes first."""
    from ..cache.format.fingerprint import weights_checksum
    from ..training import Run, TokenizerTrainer, reconstructions
    from ..training.estimate import estimate_tokenizer

    _check_discriminator(options)
    config = _config(options)
    pictures = training.open_pictures(options, options.images, config.image_size, rank, world_size)
    device = checked_device(options.device)
    settings = _settings(options, pictures.order.steps_per_epoch, device)
    lpips, discriminator = _lpips(options), _discriminator(options)
    model = _tokenizer(options, config).to(device)
    trainer = TokenizerTrainer(
        model, settings, lpips=lpips, discriminator=discriminator, sharded=options.sharded
    )
    names = ("batch_size", "seed", "discriminator", "lpips_dropout")
    arguments = {name: getattr(options, name) for name in names}
    # Checkpoints do not hold frozen weights.
    frozen = {"backbone": model.backbone, "lpips": lpips, "dino": discriminator}
    for name, part in frozen.items():
        arguments[name] = None if part is None else weights_checksum(_frozen(part))
    peak = training.speed(device, settings.precision, world_size)
    return Run(
        trainer, pictures, out, settings.total_steps,
        show=reconstructions(pictures) if options.show_every else None,
        flops=peak and estimate_tokenizer(config, settings, _kind(options)).flops, peak=peak,
        arguments=arguments
        | {"pictures": len(pictures.entries), "pictures_sha256": pictures.sha256},
    )  # fmt: skip


def _frozen(part: nn.Module) -> dict[str, Tensor]:
    return {name: w for name, w in part.named_parameters() if not w.requires_grad}


def _dry_run(options: argparse.Namespace) -> int:
    """Estimate the real model without allocating it; run two steps of a small one on the images."""
    import dataclasses

    from ..tokenizer import VFMTok
    from ..training import TokenizerTrainer
    from ..training.estimate import estimate_tokenizer
    from ..untrained import TOKENIZERS

    config, device = _config(options), checked_device(options.device)
    pictures = training.open_pictures(options, options.images, config.image_size)
    each = pictures.order.steps_per_epoch
    settings = _settings(options, each, device)
    count = len(pictures.entries)
    say(f"{count} pictures, {each} steps an epoch, {settings.total_steps} steps in all")
    found = estimate_tokenizer(config, settings, _kind(options))
    training.tell_estimate(found, each * options.batch_size, settings.precision, device)
    size = dataclasses.replace(TOKENIZERS["small"], image_size=config.image_size, grid=config.grid)
    trainer = TokenizerTrainer(
        VFMTok(size).to(device), dataclasses.replace(settings, perceptual_weight=0)
    )
    training.try_steps(options, trainer, pictures)
    return 0


def _settings(
    options: argparse.Namespace, steps_per_epoch: int, device: torch.device
) -> TokenizerTraining:
    from ..training import TokenizerTraining, rae

    if options.deterministic and not options.fast and device.type == "cuda":
        raise ValueError(
            "--deterministic needs our kernels on a GPU, where torch's gradient of grid_sample is "
            "not deterministic; drop --no-fast"
        )
    fields = rae(steps_per_epoch) if options.recipe == "rae" else {}
    fields |= training.fields_of(options, steps_per_epoch, device)
    fields |= {
        "pixel_loss": options.pixel_loss, "revive_after": options.revive_after,
        "perceptual_weight": 0.0 if options.no_lpips else 1.0,
    }  # fmt: skip
    if options.skip_idle_discriminator:
        fields["idle_discriminator"] = False
    for name in ("discriminator_start", "discriminator_weight"):
        if getattr(options, name) is not None:
            fields[name] = getattr(options, name)
    if options.discriminator_start is not None:
        fields.pop("discriminator_update_start", None)
    return TokenizerTraining(**fields)


def _config(options: argparse.Namespace) -> VFMTokConfig:
    import dataclasses

    from ..configs import config_from_mapping
    from ..tokenizer import VFMTok, VFMTokConfig
    from ..untrained import TOKENIZERS

    if options.start_from is not None:
        if options.config is not None:
            raise ValueError("--start-from brings its own config; leave out --config")
        config = VFMTok.from_pretrained(options.start_from).config
    elif options.config is not None:
        config = config_from_mapping(VFMTokConfig, read_config(local_path(options.config)))
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
        note("note: a backbone with random weights; for tests only")
        return model
    return load_backbone(model, options.backbone)


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
    if options.discriminator != "dino" and options.dino_vits16 is not None:
        raise ValueError(f"--dino-vits16 is not for --discriminator {options.discriminator}")


def _kind(options: argparse.Namespace) -> type[DinoDiscriminator | PatchDiscriminator] | None:
    from ..training import DinoDiscriminator, PatchDiscriminator

    return {"dino": DinoDiscriminator, "patch": PatchDiscriminator}.get(options.discriminator)


def _discriminator(options: argparse.Namespace) -> DinoDiscriminator | PatchDiscriminator | None:
    import torch

    torch.manual_seed(options.seed)
    kind = _kind(options)
    if options.discriminator == "dino":
        return kind.from_files(options.dino_vits16)
    return None if kind is None else kind()
