"""`vfmtok-fast train-gpt`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from . import training
from .cache import add_choices
from .choices import PRESETS
from .convert import read_config
from .models import add_input_option, checked_device
from .output import local_path, say
from .training_reports import conclude

if TYPE_CHECKING:
    import torch

    from ..cache.format.manifest import Manifest
    from ..generator import GPT, GPTConfig
    from ..tokenizer import VFMTok
    from ..training import Codes, OnlineCodes, Run

SUMMARY = "train a generator on a token cache or on pictures, or resume a run"
# File for the result under the authors' names.
OFFICIAL = "gpt.pt"
# Below this loss, a generator has memorised its training data.
LEARNED = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input_path",
        metavar="CACHE",
        help="what `cache` made; or pictures as `cache` reads them, with --model, which then "
        "makes their codes at each step",
    )
    parser.add_argument("out", metavar="OUT", help="the run: a new folder, or one to resume")
    add_input_option(parser)
    add_choices(parser)
    parser.add_argument(
        "--views", nargs="+", metavar="VIEW", help="views of the cache to draw from (all)"
    )
    parser.add_argument(
        "--model",
        metavar="TOKENIZER",
        help="the cache's tokenizer, a folder, a hub repo or emoji: checked, and used to show "
        "pictures",
    )
    parser.add_argument(
        "--overfit",
        type=int,
        metavar="N",
        help="check instead: learn the first N pictures, each as a class of its own, until greedy "
        "generation reproduces their codes; exit code 1 if it does not",
    )
    _add_model(parser)
    group = training.add_schedule_options(parser, epochs=300, batch_size=256, warmup_epochs=0)
    group.add_argument("--schedule", choices=("constant", "cosine"), help="(constant)")
    group.add_argument("--ema", type=float, help="decay of the EMA (0.9999)")
    group.add_argument("--weight-decay", type=float, default=0.05, help="(%(default)s)")
    training.add_machine_options(parser)
    training.add_run_options(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    source = group.add_mutually_exclusive_group()
    source.add_argument("--preset", choices=PRESETS, default="GPT-B", help="size (%(default)s)")
    source.add_argument("--config", metavar="FILE", help="JSON with fields of GPTConfig")
    source.add_argument("--start-from", metavar="FOLDER", help="a generator to train further")
    group.add_argument("--dropout", type=float, help="dropout in embeddings and branches (0.1)")
    group.add_argument("--class-dropout", type=float, help="of classes, for guidance (0.1)")
    group.add_argument(
        "--drop-path", type=float, help="instead of the branches' dropout, like the authors' (none)"
    )


def run(options: argparse.Namespace) -> int:
    if options.overfit is not None and options.overfit < 1:
        raise ValueError("--overfit must be at least 1")
    return training.run_to_end(options, _prepare, _dry_run, _finish)


def _prepare(options: argparse.Namespace, out: Path, rank: int, world_size: int) -> Run:
    """Make the run; what is quick to check comes first."""
    import torch

    from ..cache.format.fingerprint import weights_checksum
    from ..generator import GPT
    from ..training import GPTTrainer, GPTTraining, Run, generated
    from ..training.estimate import estimate_gpt

    device = checked_device(options.device)
    data, manifest, tokenizer = _data(options, device, rank, world_size)
    config = _config(options, data.num_classes, manifest, tokenizer)
    settings = GPTTraining(**training.fields_of(options, data.order.steps_per_epoch, device))
    if options.start_from is not None:
        model = GPT.from_pretrained(options.start_from, config=config)
    else:
        torch.manual_seed(options.seed)
        model = GPT(config)
    trainer = GPTTrainer(model.to(device), settings, sharded=options.sharded)
    arguments = {name: getattr(options, name) for name in ("batch_size", "seed", "overfit")}
    # A run cannot go on with another tokenizer's codes.
    if manifest:
        arguments |= {"tokens": manifest.fingerprint, "pictures_sha256": manifest.index_sha256}
        arguments["views"] = list(data.data.views)
    else:
        arguments["tokens"] = weights_checksum(tokenizer.state_dict())
        arguments["pictures_sha256"] = data.pictures.sha256
    arguments |= {"pictures": data.order.count, "classes": data.num_classes}
    peak = training.speed(device, settings.precision, world_size)
    return Run(
        trainer, data, out, settings.total_steps, arguments=arguments,
        show=None if tokenizer is None else generated(tokenizer),
        flops=peak and estimate_gpt(config, settings).flops, peak=peak,
    )  # fmt: skip


def _finish(options: argparse.Namespace, work: Run, model: GPT, rank: int) -> int:
    from ..checkpoint import official_gpt

    trainer, overfit = work.trainer, options.overfit is not None
    learned = trainer.whole(trainer.model) if overfit else None
    if rank:
        return 0
    training.save_official(work.out / OFFICIAL, official_gpt(model))
    epochs, folder = trainer.steps / work.data.order.steps_per_epoch, work.out / "model"
    conclude(
        options,
        f"{work.out}: {trainer.steps} steps, {epochs:.2f} epochs; the generator is {folder}",
    )
    return _check_learned(options, work, learned.eval()) if overfit else 0


def _data(
    options: argparse.Namespace, device: torch.device, rank: int, world_size: int
) -> tuple[Codes | OnlineCodes, Manifest | None, VFMTok | None]:
    """Return the training data; the manifest, if it is a cache; and the tokenizer, if named."""
    from ..cache import TokenCacheDataset
    from ..cache.format.manifest import NAME
    from ..cache.store import place
    from ..tokenizer import VFMTok
    from ..training import Codes, OnlineCodes

    tokenizer = None
    if options.model is not None:
        tokenizer = VFMTok.from_pretrained(options.model)
    if (place(options.input_path) / NAME).exists():
        choices = ("input", "split", "include", "exclude", "image_column", "label_column")
        if given := [name for name in choices if getattr(options, name)]:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{names}: only for pictures; {options.input_path} is a token cache")
        data = TokenCacheDataset(options.input_path, options.views, seed=options.seed)
        manifest = data.cache.manifest
        if tokenizer is not None:
            _check_tokenizer(tokenizer, manifest, options)
            tokenizer.to(device)
        codes = Codes(
            data, options.batch_size, few=options.overfit, seed=options.seed, rank=rank,
            world_size=world_size,
        )  # fmt: skip
        return codes, manifest, tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{options.input_path}: not a token cache; make one with vfmtok-fast cache, or give "
            "the --model that makes the codes of these pictures"
        )
    if options.overfit is not None or options.views is not None:
        name = "--views" if options.overfit is None else "--overfit"
        raise ValueError(f"{name} needs a token cache; {options.input_path} holds pictures")
    size = tokenizer.config.image_size
    pictures = training.open_pictures(options, options.input_path, size, rank, world_size)
    return OnlineCodes(pictures, tokenizer.to(device)), None, tokenizer


def _check_tokenizer(tokenizer: VFMTok, manifest: Manifest, options: argparse.Namespace) -> None:
    """Refuse a tokenizer whose codes are not those of the cache."""
    import copy

    from ..cache.format.fingerprint import weights_checksum

    # The cache records the checksum of the weights in its own precision.
    rounded = copy.deepcopy(tokenizer).set_precision(manifest.covers["dtype"])
    if weights_checksum(rounded.state_dict()) != manifest.covers["weights_sha256"]:
        raise ValueError(
            f"{options.input_path}: its tokens are from a tokenizer other than {options.model}; "
            "name that one, or make the cache again"
        )


def _config(
    options: argparse.Namespace, num_classes: int, manifest: Manifest | None,
    tokenizer: VFMTok | None,
) -> GPTConfig:  # fmt: skip
    """Return the model's config; what the data determines is checked if a file states it too."""
    import dataclasses

    from ..configs import config_from_mapping
    from ..generator import GPT, GPTConfig

    if manifest is not None:
        own = {"vocab_size": manifest.codebook_size, "block_size": manifest.num_tokens}
    else:
        made = tokenizer.config
        own = {"vocab_size": made.codebook_size, "block_size": made.num_regions}
    own["num_classes"] = num_classes
    if options.start_from is not None:
        config = GPT.from_pretrained(options.start_from).config
    elif options.config is not None:
        fields = read_config(local_path(options.config))
        config = config_from_mapping(GPTConfig, {**own, **fields})
    else:
        config = GPTConfig.preset(options.preset, **own)
    for name in ("vocab_size", "block_size"):
        if getattr(config, name) != own[name]:
            raise ValueError(
                f"{options.input_path}: a generator of {name} {getattr(config, name)} cannot learn "
                f"from tokens of another codebook, whose {name} is {own[name]}"
            )
    if config.num_classes < num_classes:
        raise ValueError(
            f"{options.input_path}: has {num_classes} classes, more than the generator's "
            f"{config.num_classes}"
        )
    changed = {}
    if options.overfit is not None:
        names = ("class_dropout", "token_dropout", "residual_dropout", "ffn_dropout", "drop_path")
        changed = dict.fromkeys(names, 0.0)
    else:
        if options.dropout is not None:
            names = ("token_dropout", "residual_dropout", "ffn_dropout")
            changed = dict.fromkeys(names, options.dropout)
        if options.drop_path is not None:
            changed["drop_path"] = options.drop_path
        if options.drop_path:
            changed |= {"residual_dropout": 0.0, "ffn_dropout": 0.0}
    if options.class_dropout is not None:
        changed["class_dropout"] = options.class_dropout
    return dataclasses.replace(config, **changed)


def _check_learned(options: argparse.Namespace, work: Run, model: GPT) -> int:
    """Check whether the generator reproduces the codes that it was trained on."""
    import torch

    batch = work.data.batch(range(options.overfit))
    codes, classes = work.data.arguments(batch, model.device)
    loss = 0.0
    with torch.no_grad():
        for some, of in zip(
            *(part.split(options.batch_size) for part in (codes, classes)), strict=True
        ):
            loss += float(model.loss(some, of)) * len(some) / len(codes)
        same = float((model.generate(classes, greedy=True) == codes).float().mean())
    conclude(
        options,
        f"loss {loss:.3g} (limit: {LEARNED}); greedy generation reproduces {same:.2%} of the codes",
    )
    return 0 if loss < LEARNED and same == 1 else 1


def _dry_run(options: argparse.Namespace) -> int:
    """Estimate the real model without allocating it; run two steps of a small one on the codes."""
    import dataclasses

    from ..generator import GPT
    from ..training import GPTTrainer, GPTTraining
    from ..training.estimate import estimate_gpt
    from ..untrained import GPTS

    device = checked_device(options.device)
    data, manifest, tokenizer = _data(options, device, 0, 1)
    config = _config(options, data.num_classes, manifest, tokenizer)
    each = data.order.steps_per_epoch
    settings = GPTTraining(**training.fields_of(options, each, device))
    say(f"{data.order.count} pictures, {each} steps an epoch, {settings.total_steps} steps in all")
    found = estimate_gpt(config, settings)
    training.tell_estimate(found, each * options.batch_size, settings.precision, device)
    names = ("vocab_size", "block_size", "num_classes")
    small = dataclasses.replace(GPTS["small"], **{name: getattr(config, name) for name in names})
    trainer = GPTTrainer(GPT(small).to(device), settings)
    training.try_steps(options, trainer, data)
    return 0
