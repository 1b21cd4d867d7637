"""What each command of `vfmtok_fast.cli` does; every function returns an exit code."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from . import cache as token_cache
from . import checkpoint, images, samples, switch, tuner, untrained
from .cache.atomic import atomic_file, make_folder
from .cache.index import count_unlabelled, read_choices, used_labels
from .cache.job import INDEX
from .cache.sources import open_source
from .cache.sources.base import LeftOutWarning
from .cache.sources.choice import split_patterns
from .cache.sources.folder import walk
from .cache.store import Place, place
from .cache.views import parse_views
from .generator import GPT, Sampling
from .ops.checks import check_class_ids
from .tokenizer import VFMTok
from .visualize import reconstruction_grid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

# Names that a note lists.
_MOST_NAMES = 10
UNTRAINED_NOTE = "note: untrained weights; the tokens mean nothing and pictures are noise"


def convert(options: argparse.Namespace) -> int:
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder; choose a new one")
    if options.backbone is not None and options.what != "tokenizer":
        raise ValueError("--backbone goes with the tokenizer only")
    config = None
    if options.config is not None:
        config = _read_config(Path(options.config))
    file = options.file or checkpoint.fetch_official(options.what, "--file")
    if options.what == "tokenizer":
        model = VFMTok.from_official(file, options.backbone, config)
    else:
        model = GPT.from_official(file, config or options.what)
    # Whole or not at all: an empty folder may be replaced, so the last step is one rename.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.tmp-", dir=out.parent) as temporary:
        finished = Path(temporary) / "model"
        model.save_pretrained(finished)
        finished.replace(out)
    print(f"wrote {out}/config.json and {out}/model.safetensors")
    return 0


def _read_config(path: Path) -> dict:
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold one JSON object of config fields")
    return config


def cache(options: argparse.Namespace) -> int:
    settings = {
        "input_kind": options.input,
        "views": options.views,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "shard_size": options.shard_size,
        "max_bad": options.max_bad,
        "workers": options.workers,
        "extend": options.extend,
        "hashed": options.hash,
        **_choices(options),
    }
    # Before the model, which may have to be downloaded.
    parse_views(options.views)
    open_source(options.images, options.input, **_choices(options))
    progress = _json_lines() if options.json else True
    if options.engine == "ray":
        rank, summary = 0, _cache_on_ray(options, settings, progress)
    else:
        if options.actors is not None:
            raise ValueError("--actors goes with --engine ray")
        rank, world_size = _place_among_processes(options)
        shard_range = _shard_range(options.shard_range)
        tokenizer = _tokenizer(options)
        with _policy(options), _notes():
            summary = token_cache.build(
                options.images,
                options.out,
                tokenizer,
                rank=rank,
                world_size=world_size,
                shard_range=shard_range,
                progress=progress if rank == 0 else False,
                **settings,
            )
    _tell(summary, options.json, rank)
    return summary.exit_code


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Say what an input's listing passed over, in a line on stderr."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning, category: type[Warning], *place: object) -> None:
            if issubclass(category, LeftOutWarning):
                print(f"note: {message}", file=sys.stderr)
            else:
                show(message, category, *place)

        warnings.simplefilter("always", LeftOutWarning)
        warnings.showwarning = note
        yield


def _choices(options: argparse.Namespace) -> dict:
    """Which files and columns of the input are taken."""
    include = options.include
    if options.split is not None:
        if include:
            raise ValueError("--split is an --include of its own; give one of the two")
        include = split_patterns(options.split)
    return {
        "include": include,
        "exclude": options.exclude,
        "image_column": options.image_column,
        "label_column": options.label_column,
    }


def _open_again(options: argparse.Namespace) -> None:
    """Before the model, which may have to be downloaded: is the cache's input there?"""
    kind, choices = read_choices(place(options.out) / INDEX)
    open_source(options.images, options.input or kind, **choices)


def _cache_on_ray(
    options: argparse.Namespace, settings: dict, progress: bool | Callable
) -> token_cache.Summary:
    if options.shard_range is not None:
        raise ValueError("--shard-range is for batch systems; Ray hands out the shards by itself")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("--engine ray is started once, not by torchrun")
    device = options.device
    # The actors hold the model; this process only checks its weights and sends it.
    options.device = "cpu"
    tokenizer = _tokenizer(options)
    with _policy(options), _notes():
        return token_cache.build_on_ray(
            options.images,
            options.out,
            tokenizer,
            actors=options.actors,
            device=device,
            progress=progress,
            **settings,
        )


def _tell(summary: token_cache.Summary, as_json: bool, rank: int) -> None:
    state = "incomplete" if summary.missing else "complete"
    if as_json:
        result = {"state": state, "rank": rank, **vars(summary), "out": str(summary.out)}
        result["classes"] = len(token_cache.read_manifest(summary.out).classes)
        print(json.dumps(result | {"seconds": round(summary.seconds, 3)}))
        return
    if rank:
        return
    rate = f", {summary.encoded / summary.seconds:.1f} img/s" if summary.encoded else ""
    still = f" ({summary.missing} shards are still to come)" if summary.missing else ""
    print(
        f"{summary.out}: {state}{still}; {summary.images} pictures in {summary.shards} shards, "
        f"{summary.encoded} encoded now in {summary.seconds:.1f} s{rate}"
    )
    _tell_classes(summary.out)
    if summary.bad:
        print(f"{summary.bad} could not be read: see {summary.out}/quarantine/", file=sys.stderr)
    _note_unlabelled(summary.out)


def _tell_classes(out: Place) -> None:
    """How many classes there are; and those in which there is no picture, which may be none."""
    classes, used = token_cache.read_manifest(out).classes, used_labels(out / INDEX)
    print(f"classes: {len(classes)}")
    empty = [name for number, name in enumerate(classes) if number not in used]
    if empty:
        more = f" and {len(empty) - _MOST_NAMES} more" if len(empty) > _MOST_NAMES else ""
        print(
            f"note: {len(empty)} of {len(classes)} classes have no picture: "
            f"{', '.join(empty[:_MOST_NAMES])}{more}",
            file=sys.stderr,
        )


def _note_unlabelled(out: Place) -> None:
    if count := count_unlabelled(out / INDEX):
        print(f"note: {count} pictures lie in no class folder: their label is -1", file=sys.stderr)


def _json_lines() -> Callable[[token_cache.Progress], None]:
    """A progress function that prints a line of JSON a second."""
    last = 0.0

    def report(state: token_cache.Progress) -> None:
        nonlocal last
        if time.monotonic() - last < 1:
            return
        last = time.monotonic()
        values = {**vars(state), "eta": state.eta}
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        print(json.dumps({"state": "encoding", **rounded}), flush=True)

    return report


def _place_among_processes(options: argparse.Namespace) -> tuple[int, int]:
    """Rank and world size as torchrun sets them; picks this process's GPU, if none was named."""
    found = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        value = os.environ.get(name, default)
        if not value.isascii() or not value.isdigit():
            raise ValueError(f"the environment variable {name} must be a number, is {value!r}")
        found[name] = int(value)
    if options.device in (None, "cuda") and torch.cuda.is_available():
        local = found["LOCAL_RANK"] % torch.cuda.device_count()
        options.device = f"cuda:{local}"
        torch.cuda.set_device(local)
    return found["RANK"], found["WORLD_SIZE"]


def _shard_range(text: str | None) -> tuple[int, int | None] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+):([0-9]*)", text)
    if match is None:
        raise ValueError(f"--shard-range must be A:B, as in 0:40 or 40:, got {text!r}")
    return int(match[1]), int(match[2]) if match[2] else None


def status(options: argparse.Namespace) -> int:
    if options.failures < 0:
        raise ValueError(f"--failures must be at least 0, got {options.failures}")
    found = token_cache.status(options.out)
    print(f"{options.out}: {found.state}")
    if found.state != "indexing":
        print(f"  pictures: {found.done} of {found.images} done, {found.bad} could not be read")
        print(f"  shards:   {found.shards_done} of {found.shards}")
        print(f"  views:    {', '.join(found.views)}")
    if found.damaged:
        print(f"  damaged:  shards {', '.join(map(str, found.damaged))} (made again by cache)")
    if found.writing:
        print(f"  files being written, or left by a process that died: {found.writing}")
    if found.bad and options.failures:
        for entry in itertools.islice(token_cache.failures(options.out), options.failures):
            print(f"  {entry['path']}: {entry['reason']}")
    if found.state != "complete":
        return 1
    return 3 if found.bad else 0


def verify(options: argparse.Namespace) -> int:
    if options.sheet is not None and Path(options.sheet).suffix.lower() != ".png":
        raise ValueError(f"--sheet: the picture to write must be named .png, got {options.sheet}")
    token_cache.read_manifest(options.out)
    if options.images:
        _open_again(options)
    chosen = options.model or options.tokenizer or options.untrained
    tokenizer = _tokenizer(options) if options.images or chosen else None
    with _policy(options):
        report = token_cache.verify(
            options.out,
            tokenizer,
            options.images,
            input_kind=options.input,
            sample=options.sample,
            sheet=options.sheet,
        )
    for problem in report.problems:
        print(problem, file=sys.stderr)
    again = ""
    if report.agreement is not None:
        again = f"; {report.sampled} encoded again, {report.agreement:.4%} of tokens agree"
    verdict = "sound" if report.ok else f"{len(report.problems)} problems"
    print(
        f"{options.out}: {verdict}; {report.images} pictures in {report.shards} shards, "
        f"{report.bad} could not be read{again}"
    )
    if not report.ok:
        return 1
    return 3 if report.bad else 0


def repair(options: argparse.Namespace) -> int:
    token_cache.read_manifest(options.out)
    _open_again(options)
    tokenizer = _tokenizer(options)
    with _policy(options):
        made = token_cache.repair(
            options.images,
            options.out,
            tokenizer,
            input_kind=options.input,
            workers=options.workers,
            tell=lambda problem: print(problem, file=sys.stderr),
        )
    found = token_cache.status(options.out)
    print(f"{options.out}: {found.state}; {made} of {found.shards} shards made again")
    return 3 if found.bad else 0


def export(options: argparse.Namespace) -> int:
    count = token_cache.export(options.out, options.target, options.format, views=options.views)
    bad = token_cache.status(options.out).bad
    print(f"wrote {options.target}: {count} pictures")
    if bad:
        print(f"{bad} could not be read and are left out", file=sys.stderr)
    _note_unlabelled(place(options.out))
    return 3 if bad else 0


def reconstruct(options: argparse.Namespace) -> int:
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"the picture to write must be named .png, got {out}")
    if options.limit < 1 or options.regions < 1:
        raise ValueError("--limit and --regions must be at least 1")
    photos = _photos(Path(options.images), options.limit)
    tokenizer = _tokenizer(options)
    size = tokenizer.config.image_size
    crops = []
    for path in photos:
        try:
            crops.append(images.load_images([path], size))
        except OSError as error:
            print(f"left out: {path}: {error.strerror}", file=sys.stderr)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not crops:
        raise ValueError(f"{options.images}: no picture could be read")
    with _policy(options):
        regions = min(options.regions, tokenizer.config.num_regions)
        grid = reconstruction_grid(tokenizer, torch.cat(crops), regions)
    _write_png(out, grid)
    print(f"wrote {out}: photo | reconstruction | where {regions} regions look")
    return 3 if len(crops) < len(photos) else 0


def _photos(path: Path, limit: int) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such picture or folder")
    found = [path / name for name, _ in walk(path)][:limit]
    if not found:
        raise ValueError(f"{path}: no pictures in this folder")
    return found


def sample(options: argparse.Namespace) -> int:
    if min(options.num, options.batch_size or 1, options.size) < 1:
        raise ValueError("--num, --batch-size and --size must be at least 1")
    rank, world_size = _place_among_processes(options)
    gpt, tokenizer = _gpt(options), _tokenizer(options)
    if gpt.config.block_size != tokenizer.config.num_regions or (
        gpt.config.vocab_size > tokenizer.config.codebook_size
    ):
        raise ValueError(
            f"the generator makes {gpt.config.block_size} codes of {gpt.config.vocab_size}, the "
            f"tokenizer decodes {tokenizer.config.num_regions} of {tokenizer.config.codebook_size}"
        )
    classes = torch.tensor(options.classes or range(gpt.config.num_classes))
    names = ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p", "greedy", "seed")
    settings = {name: getattr(options, name) for name in names}
    # All that can be wrong is found before the long work, and before anything is written.
    check_class_ids("--classes", classes, gpt.config.num_classes)
    Sampling(**settings).check()
    kv_dtype = torch.int8 if options.kv_int8 else None
    class_ids = classes[torch.arange(options.num) % len(classes)]
    job = samples.Job(
        gpt, tokenizer, Path(options.out), class_ids, options.size, settings, kv_dtype
    )
    samples.prepare(job)
    mine = samples.pending(job)[rank::world_size]
    count = sum(len(job.rows(number)) for number in mine)
    hidden = True if rank else None  # None: hidden where there is no terminal.
    with _policy(options), tqdm(total=count, unit="img", desc="sample", disable=hidden) as bar:
        samples.make_shards(job, mine, options.batch_size, bar.update)
    if not samples.finish(job):
        left = len(samples.pending(job))
        print(f"{job.out}: {count} images made now; {left} shards are still to come")
        return 0
    shown = next(samples.shards_of(job))
    _write_png(job.out / "samples.png", images.image_grid(shown, int(len(shown) ** 0.5)))
    if rank == 0:
        print(f"wrote {job.out}/samples.png ({len(shown)}) and samples.npz ({options.num} images)")
    return 0


# Packages that nothing needs by default: the extra that installs each, and what it is for.
OPTIONAL = {
    "ray": ("ray", "`cache --engine ray`"),
    "lmdb": ("lmdb", "pictures in the authors' LMDB"),
    "pillow-heif": ("heif", "pictures named .heic or .heif"),
    "s3fs": ("cloud", "caches at s3://"),
    "gcsfs": ("cloud", "caches at gs://"),
    "flash-attn": ("flash-attn", "decode_attention where Triton cannot take it"),
    "xformers": ("xformers", "decode_attention where Triton cannot take it"),
}


def tune(options: argparse.Namespace) -> int:
    outcome = tuner.tune(
        options.models,
        options.ops,
        options.seconds,
        device=options.device,
        progress=sys.stderr.isatty(),
        path=options.out,
    )
    print(outcome)
    return 0


def doctor(options: argparse.Namespace) -> int:
    print(f"python {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "triton", "torchvision", "timm", "pillow", "safetensors", "pyarrow"):
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed")
    for name, (extra, use) in OPTIONAL.items():
        try:
            print(f"{name} {importlib.metadata.version(name)}: {use}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is not installed: {use}; pip install 'vfmtok-fast[{extra}]'")
    print(f"CPU: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        print("GPU: none that torch can use, so no Triton kernel will run")
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        print(
            f"GPU {i}: {found.name}, {found.total_memory / 2**30:.0f} GiB, "
            f"compute capability {found.major}.{found.minor}"
        )
    print("\nWith vfmtok_fast.enable(), and in every command but with --no-fast:")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in switch.status().ops:
        print(f"  {name}: {switch.forecast(name, device)}")
    for line in switch.tables():
        print(f"  {line}")
    return 0


def _policy(options: argparse.Namespace) -> AbstractContextManager:
    return switch.enable() if options.fast else contextlib.nullcontext()


def _tokenizer(options: argparse.Namespace) -> VFMTok:
    if options.backbone is not None and options.tokenizer is None:
        raise ValueError("--backbone goes with --tokenizer")
    if options.untrained is not None:
        print(UNTRAINED_NOTE, file=sys.stderr)
        model = untrained.untrained_tokenizer(options.untrained)
    elif options.model is not None:
        model = VFMTok.from_pretrained(options.model)
    else:
        file = options.tokenizer or checkpoint.fetch_official("tokenizer", "--tokenizer")
        model = VFMTok.from_official(file, options.backbone)
    return _place(model, options)


def _gpt(options: argparse.Namespace) -> GPT:
    if options.untrained is not None:
        if options.gpt is not None:
            raise ValueError("--untrained brings its own generator; leave out --gpt")
        gpt = untrained.untrained_gpt(options.untrained)
    elif options.gpt is None:
        raise ValueError(
            "--gpt names the generator: a folder made by `vfmtok-fast convert GPT-L FOLDER`"
        )
    else:
        gpt = GPT.from_pretrained(options.gpt)
    return _place(gpt, options)


def _place(model: torch.nn.Module, options: argparse.Namespace) -> torch.nn.Module:
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA devices")
    return model.eval().to(device, getattr(torch, options.dtype))


def _write_png(path: Path, picture: np.ndarray) -> None:
    make_folder(path.parent)
    with atomic_file(path) as file:
        Image.fromarray(picture).save(file, format="PNG")
