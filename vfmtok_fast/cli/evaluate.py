"""`vfmtok-fast evaluate`: reconstruction, generation, sweep, probe."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bars import bar
from .cache import open_input
from .evaluate_options import add_generation, add_probe, add_reconstruction, add_sweep
from .models import check_seed, checked_device, load_gpt, load_tokenizer, policy
from .output import check_writable, local_path, note, say
from .sample import check_together, fill, growing

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from ..cache.sources import Source
    from ..evaluation import Generation, Inception
    from ..training import LPIPS

SUMMARY = "metrics by named protocols: of reconstructions, generated pictures, features"
RANDOM_NOTE = (
    "note: an Inception with random weights: FID and similar metrics test the arithmetic and mean "
    "nothing; --inception FILE names real ones"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, (summary, add, _) in WHAT.items():
        add(kinds.add_parser(name, help=summary, description=summary))


def run(options: argparse.Namespace) -> int:
    counts = ("num", "size", "batch_size", "workers", "epochs")
    given = {name: getattr(options, name, None) for name in counts}
    if small := [name for name, value in given.items() if value is not None and value < 1]:
        names = (f"--{name.replace('_', '-')}" for name in small)
        raise ValueError(f"{', '.join(names)} must be at least 1")
    check_seed(getattr(options, "seed", None))
    out = local_path(options.out)
    if options.what != "sweep":
        if out.exists():
            raise FileExistsError(f"{out} already exists; choose another name with --out")
        check_writable(out)
    return WHAT[options.what][2](options, out)


def _reconstruction(options: argparse.Namespace, out: Path) -> int:
    from .. import evaluation

    protocol = evaluation.protocol(options.protocol, evaluation.Reconstruction)
    protocol = protocol.changed(num=options.num, size=options.size)
    source = open_input(options, options.images)
    lpips = _lpips(options)
    tokenizer = load_tokenizer(options, options.device)
    inception = None if options.no_inception else _inception(options, tokenizer.device)
    with policy(options), bar(protocol.num, "img", "reconstruct") as shown:
        result = evaluation.evaluate_reconstruction(
            tokenizer, source, protocol, inception,
            lpips=None if lpips is None else lpips.to(tokenizer.device),
            batch_size=options.batch_size, workers=options.workers, advance=shown.update,
        )  # fmt: skip
    return _report(result, out)


def _generation(options: argparse.Namespace, out: Path) -> int:
    from .. import evaluation

    protocol = _against(options)
    inception = _inception(options, checked_device(options.device))
    with bar(None, "img", "Inception") as shown:
        result = evaluation.evaluate_generation(
            options.samples, options.reference, protocol, inception,
            labelled=not options.no_labels, batch_size=options.batch_size, advance=shown.update,
        )  # fmt: skip
    return _report(result, out)


def _sweep(options: argparse.Namespace, out: Path) -> int:
    """Sample at each scale, or resume the samples that exist; evaluate; plot."""
    from .. import evaluation, sample_folder
    from ..generator import Sampling

    there = _figures_in(out / "sweep.json", options.cfg_scale)
    protocol = _against(options)
    gpt, tokenizer = load_gpt(options, options.device), load_tokenizer(options, options.device)
    check_together(gpt, tokenizer)
    inception = _inception(options, tokenizer.device)
    names = ("cfg_interval", "temperature", "top_k", "top_p", "seed")
    same = {name: getattr(options, name) for name in names} | {"greedy": False}
    same |= growing(options)
    # Everything is checked before hours of sampling.
    real = evaluation.open_reference(options.reference, protocol, inception)
    for scale in options.cfg_scale:
        Sampling(cfg_scale=scale, **same).check()
    ids = evaluation.class_ids(options.labels, protocol.num, gpt.config.num_classes, options.seed)
    jobs = []
    for scale in options.cfg_scale:
        settings, folder = {"cfg_scale": scale, **same}, out / f"cfg-{scale:.12g}"
        jobs.append(sample_folder.Job(gpt, tokenizer, folder, ids, protocol.size, settings))
    with policy(options):
        if there:
            against = {
                "protocol": dataclasses.asdict(protocol), "inception": inception.described,
                "reference": real.sha256(), "sampling": sample_folder.describe(jobs[0]),
            }  # fmt: skip
            _check_figures(there, against, out / "sweep.json")
        for job in jobs:
            sample_folder.prepare(job)
            sample_folder.pending(job)
    results = []
    for scale, job in zip(options.cfg_scale, jobs, strict=True):
        fill(options, job, sample_folder.pending(job), None)
        sample_folder.finish(job)
        with bar(None, "img", f"Inception, scale {scale:g}") as shown:
            found = evaluation.evaluate_generation(
                job.out, options.reference, protocol, inception, batch_size=options.batch_size,
                advance=shown.update,
            )  # fmt: skip
        results.append({"cfg_scale": scale, **found})
    _warn(line for result in results for line in result["warnings"])
    _say_row("scale", *results[0]["metrics"])
    for result in results:
        _say_row(result["cfg_scale"], *result["metrics"].values())
    _write(out / "sweep.json", {"drawn_labels": options.labels, "results": results})
    if not evaluation.plot_sweep(out / "sweep.png", results):
        note("note: no plot without matplotlib: pip install 'vfmtok-fast[eval]'")
    say(f"wrote {out}/sweep.json: {_named(results[0])}")
    return 0


def _figures_in(path: Path, scales: list[float]) -> list[dict[str, Any]]:
    """What the results of an earlier sweep depend on; scales that are not asked for are refused."""
    if not path.exists():
        return []
    try:
        there = [
            {
                "protocol": dict(result["protocol"]),
                "inception": dict(result["inception"]),
                "reference": result["reference"]["sha256"],
                "sampling": {k: v for k, v in result["sampling"].items() if k != "noise"},
            }
            for result in json.loads(path.read_text())["results"]
        ]
        known = [float(one["sampling"]["cfg_scale"]) for one in there]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged; remove it and run again") from error
    if left := [scale for scale in known if scale not in scales]:
        raise FileExistsError(
            f"{path} also has scale {left[0]:g}; name it as well, or choose another folder"
        )
    return there


def _check_figures(there: list[dict[str, Any]], here: dict[str, Any], path: Path) -> None:
    """Refuse to overwrite results of anything else; the scales may differ."""
    from ..cache.format.differences import differences

    for one in there:
        sampling = here["sampling"] | {"cfg_scale": one["sampling"]["cfg_scale"]}
        if differing := differences(one, here | {"sampling": sampling}):
            raise FileExistsError(
                f"{path} holds other figures ({differing}); choose another folder"
            )


def _probe(options: argparse.Namespace, out: Path) -> int:
    from .. import evaluation
    from ..cache.sources import open_source

    probe = evaluation.PROBES[options.protocol].changed(epochs=options.epochs, seed=options.seed)
    train = open_input(options, options.images)
    test = None
    if options.test is not None:
        # The choice of training images, for example a split, does not apply to the test images.
        test = open_source(
            options.test, options.input, image_column=options.image_column,
            label_column=options.label_column,
        )  # fmt: skip
        if _pictures_of(test) == _pictures_of(train):
            raise ValueError(f"--test {options.test}: these are the training pictures; name others")
    tokenizer = load_tokenizer(options, options.device)
    with policy(options), bar(options.num, "img", "features") as shown:
        result = evaluation.evaluate_probe(
            tokenizer, train, test, probe, options.features, num=options.num,
            batch_size=options.batch_size, workers=options.workers, advance=shown.update,
        )  # fmt: skip
    return _report(result, out)


def _pictures_of(source: Source) -> tuple:
    """Return a key that is equal for inputs that hold the same images, however they are spelled."""
    return source.root.resolve(), source.files(), source.chosen


# What is evaluated: a line of help, its options, and what it does.
WHAT = {
    "reconstruction": (
        "rFID, rIS, PSNR, SSIM, LPIPS and codebook usage of a tokenizer",
        add_reconstruction,
        _reconstruction,
    ),
    "generation": (
        "FID, sFID, IS, precision and recall of generated pictures",
        add_generation,
        _generation,
    ),
    "sweep": (
        "sample at several guidance scales and evaluate each; resumes",
        add_sweep,
        _sweep,
    ),
    "probe": ("linear probe and nearest neighbours on features", add_probe, _probe),
}


def _against(options: argparse.Namespace) -> Generation:
    from .. import evaluation

    protocol = evaluation.protocol(options.protocol, evaluation.Generation)
    return protocol.changed(num=options.num, size=options.size)


def _inception(options: argparse.Namespace, device: torch.device) -> Inception:
    from .. import evaluation

    if options.inception is None:
        note(RANDOM_NOTE)
    return evaluation.Inception(options.inception, device)


def _lpips(options: argparse.Namespace) -> LPIPS | None:
    from ..training import LPIPS

    if options.vgg16 is not None:
        return LPIPS.from_files(options.vgg16, options.lpips_linear)
    if options.lpips_linear is not None:
        raise ValueError("--lpips-linear needs --vgg16")
    return None


def _report(result: dict[str, Any], out: Path) -> int:
    """Print a table, write everything to a file, and return the exit code."""
    _warn(result["warnings"])
    width = max(map(len, result["metrics"]))
    for name, value in result["metrics"].items():
        say(f"{name:<{width}}  {_shown(value)}")
    # Last, so that the results are on stdout even if the disk is full.
    _write(out, result)
    say(f"wrote {out}: {_named(result)}")
    return 3 if result["compared"].get("unreadable") else 0


def _named(result: dict[str, Any]) -> str:
    network = result.get("inception")
    words = f"; Inception: {network['weights']}" if network else ""
    return f"{result['protocol']['name']}{words}"


def _write(path: Path, result: dict[str, Any]) -> None:
    from .. import __version__
    from ..cache.store import LocalPlace

    place = LocalPlace(path)
    place.parent.make_folder()
    result = {"vfmtok_fast": __version__, **result}
    place.put((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())


def _warn(lines: Iterable[str]) -> None:
    for line in dict.fromkeys(lines):
        note(f"warning: {line}")


def _say_row(*values: object) -> None:
    say("  ".join(f"{_shown(value):>9}" for value in values))


def _shown(value: object) -> str:
    if value is None:
        return "-"
    # Adding 0.0 turns -0.0 into 0.0; an sFID of equal images gives -0.0.
    return f"{round(value, 4) + 0.0:.4f}" if isinstance(value, float) else str(value)
