"""What the training commands share: options, processes, and a run from its start to its end."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .cache import open_input
from .models import check_seed, policy
from .output import local_path, note, say
from .processes import among_processes
from .training_reports import EVENTS, reports, told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from torch import Tensor, nn

    from ..training import Pictures, Run, Trainer
    from ..training.estimate import Estimate
    from ..training.loop import Data

# Settings that are taken from the option of the same name, if it is given.
FIELDS = (
    *("lr", "min_lr", "clip", "micro_batch", "seed", "ema", "schedule", "weight_decay"),
    *("grad_checkpointing", "compile"),
)
# Share of the initial weights in the average from which a run warns.
MOST_INITIAL = 0.1


def add_schedule_options(
    parser: argparse.ArgumentParser, *, epochs: float, batch_size: int, warmup_epochs: float
) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("steps")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=epochs, help="(%(default)s)")
    length.add_argument("--steps", type=int, help="instead of epochs")
    group.add_argument(
        "--batch-size", type=int, default=batch_size, help="over all processes (%(default)s)"
    )
    group.add_argument("--micro-batch", type=int, help="items at a time, for less memory")
    group.add_argument("--lr", type=float, default=1e-4, help="(%(default)s)")
    group.add_argument("--warmup-epochs", type=float, default=warmup_epochs, help="(%(default)s)")
    group.add_argument("--warmup-steps", type=int, help="instead of epochs")
    group.add_argument(
        "--min-lr", type=float, default=0.0, help="where a cosine schedule ends (%(default)s)"
    )
    group.add_argument("--clip", type=float, default=1.0, help="gradient norm limit (%(default)s)")
    group.add_argument("--seed", type=int, default=0, help="seed of all randomness (%(default)s)")
    return group


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: cuda if there is one")
    group.add_argument(
        "--precision",
        choices=("float32", "tf32", "bfloat16", "float16"),
        help="default: bfloat16 on a GPU, float32 elsewhere",
    )
    group.add_argument(
        "--grad-checkpointing", action="store_true", help="less memory, a third more work"
    )
    group.add_argument("--compile", action="store_true", help="compile layers with torch.compile")
    group.add_argument(
        "--sharded",
        action="store_true",
        help="each process holds a part of each weight (FSDP2), not all weights",
    )
    group.add_argument(
        "--no-fast", dest="fast", action="store_false", help="use the reference everywhere"
    )
    group.add_argument(
        "--deterministic", action="store_true", help="the same bits in each run, on a GPU too"
    )


def add_run_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument("--workers", type=int, default=4, help="threads that read (%(default)s)")
    group.add_argument(
        "--save-every", type=int, default=5000, help="steps between checkpoints (%(default)s)"
    )
    group.add_argument("--keep", type=int, default=3, help="newest checkpoints kept (%(default)s)")
    group.add_argument(
        "--log-every", type=int, default=50, help="steps between log lines (%(default)s)"
    )
    group.add_argument(
        "--show-every", type=int, default=1000, help="steps between grids; 0: none (%(default)s)"
    )
    group.add_argument(
        "--tensorboard", action="store_true", help="also write TensorBoard events into OUT"
    )
    group.add_argument("--json", action="store_true", help="also print the log's lines on stdout")
    group.add_argument(
        "--accept-changes", action="store_true", help="resume with settings other than before"
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing: run two steps of a small model, and say what the real one would take",
    )


def check_options(options: argparse.Namespace) -> None:
    counts = ("batch_size", "workers", "save_every", "keep", "log_every")
    if small := [f"--{name.replace('_', '-')}" for name in counts if getattr(options, name) < 1]:
        raise ValueError(f"{', '.join(small)} must be at least 1")
    if options.show_every < 0:
        raise ValueError(f"--show-every must be at least 0, got {options.show_every}")
    if not 0 < options.epochs < math.inf:
        raise ValueError(f"--epochs must be a number above 0, got {options.epochs}")
    if not 0 <= options.warmup_epochs < math.inf:
        raise ValueError(
            f"--warmup-epochs must be a number of at least 0, got {options.warmup_epochs}"
        )
    check_seed(options.seed)


def open_pictures(
    options: argparse.Namespace, root: str, size: int, rank: int = 0, world_size: int = 1
) -> Pictures:
    from ..training import Pictures

    return Pictures(
        open_input(options, root), options.batch_size, size=size, seed=options.seed,
        workers=options.workers, rank=rank, world_size=world_size,
    )  # fmt: skip


def fields_of(
    options: argparse.Namespace, steps_per_epoch: int, device: torch.device
) -> dict[str, object]:
    """Return the fields that both trainers' settings have; ``total_steps`` is the run's length."""
    steps, warmup = options.steps, options.warmup_steps
    if steps is None:
        steps = max(1, round(options.epochs * steps_per_epoch))
    if warmup is None:
        warmup = round(options.warmup_epochs * steps_per_epoch)
    given = {name: getattr(options, name, None) for name in FIELDS}
    return {
        "warmup_steps": warmup, "total_steps": steps,
        "precision": options.precision or ("bfloat16" if device.type == "cuda" else "float32"),
        **{name: value for name, value in given.items() if value is not None},
    }  # fmt: skip


def run_to_end(
    options: argparse.Namespace,
    prepare: Callable[[argparse.Namespace, Path, int, int], Run],
    dry_run: Callable[[argparse.Namespace], int],
    finish: Callable[[argparse.Namespace, Run, nn.Module, int], int],
) -> int:
    """Start or resume a run among all processes, train, and save the averaged model.

    Args:
        prepare: called with the options, the folder, this process's rank and the number of
            processes.
        dry_run: what --dry-run does instead.
        finish: called on all processes after training, with the options, the run, the averaged
            model and the rank; returns an exit code.

    Returns:
        The exit code; 128 plus the signal's number if a signal stopped the run.
    """
    from ..training import Stopped

    check_options(options)
    if options.dry_run:
        return dry_run(options)
    out = local_path(options.out)
    _check_out(out)
    rank, world_size, options.device = among_processes(options.device)
    if options.sharded and world_size == 1:
        raise ValueError("--sharded needs several processes, such as torchrun starts")
    with (
        _deterministic(options), _together(rank, world_size, options.device), _alone(out, rank),
        policy(options),
    ):  # fmt: skip
        work = prepare(options, out, rank, world_size)
        work.save_every, work.log_every = options.save_every, options.log_every
        work.show_every, work.keep = options.show_every, options.keep
        if (path := work.resume(changed=options.accept_changes)) and rank == 0:
            note(f"resuming from {path}")
        if rank == 0 and (warmup := work.trainer.settings.warmup_steps) > work.steps:
            note(f"note: the warm-up takes {warmup} steps, but the run has only {work.steps}")
        # --overfit checks the weights themselves.
        if rank == 0 and getattr(options, "overfit", None) is None:
            _note_average(work.trainer.settings.ema, work.steps)
        try:
            with contextlib.ExitStack() as stack:
                if rank == 0:
                    shown = reports(options, out, work.trainer.steps, work.steps)
                    work.reports = stack.enter_context(shown)
                work.train()
        except Stopped as stopped:
            if rank == 0:
                note(f"vfmtok-fast {options.command}: {stopped}; run it again to resume")
            return 128 + stopped.number
        model = work.trainer.averaged()
        if rank == 0:
            model.save_pretrained(out / "model")
        return finish(options, work, model, rank)


def _note_average(ema: float, steps: int) -> None:
    """Warn of a run that is too short for its average, which is the model that it gives."""
    if (share := ema**steps) > MOST_INITIAL:
        note(
            f"note: the result is the average of the weights, which after {steps} steps still "
            f"holds {share:.0%} of the initial ones; --ema {max(0, 1 - 10 / steps):.4g} follows "
            "faster"
        )


def _check_out(out: Path) -> None:
    """Refuse a folder that is not a run's. A run without a checkpoint starts from the beginning."""
    from ..temporary import is_temporary
    from ..training import checkpoints
    from ..training.loop import CHECKPOINTS, LOG, PICTURES

    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a new folder")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    names = {name for name in names if not is_temporary(name)}
    begun = LOG in names and names <= {CHECKPOINTS, LOG, PICTURES, EVENTS}
    if names and not begun and checkpoints.latest(out / CHECKPOINTS) is None:
        raise FileExistsError(f"{out} is neither empty nor a run to resume; choose a new folder")


@contextlib.contextmanager
def _alone(out: Path, rank: int) -> Iterator[None]:
    """Lock a run's folder on rank 0; the system unlocks it when that process ends."""
    from ..cache.store import LocalPlace

    if rank:
        yield
        return
    new = not out.exists()
    LocalPlace(out).make_folder()
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            new = False  # It belongs to the other process.
            raise FileExistsError(
                f"{out}: another process is training there; wait for it, or choose another folder"
            ) from error
        except OSError:
            pass  # Some network disks cannot lock folders.
        yield
    finally:
        if new:  # Empty if the run was refused. Still locked, so that no other run starts there.
            LocalPlace(out).remove_folder()
        os.close(folder)


@contextlib.contextmanager
def _deterministic(options: argparse.Namespace) -> Iterator[None]:
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    if options.deterministic:
        # cuBLAS sums in a fixed order only with this; it must be set before the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def save_official(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a checkpoint that the authors' code reads."""
    import torch

    from ..cache.store import LocalPlace

    with LocalPlace(path).writing() as file:
        torch.save({"ema": weights}, file)


def speed(device: torch.device, precision: str, world_size: int) -> float | None:
    """Return the FLOP/s of all GPUs, for the log; None on a CPU."""
    from ..training.estimate import product_rate

    return world_size * product_rate(device, precision) if device.type == "cuda" else None


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
    except RuntimeError as error:
        if "closed by peer" not in str(error):
            raise
        raise ConnectionError(
            "another process of this run has ended; its own message says why"
        ) from error
    finally:
        dist.destroy_process_group()


def try_steps(options: argparse.Namespace, trainer: Trainer, data: Data) -> None:
    """Run two steps of a small model, for --dry-run."""
    with policy(options), contextlib.closing(data.batches(0)) as batches:
        for _ in range(2):
            terms = trainer.step(*data.arguments(next(batches), trainer.device))
            say(f"step {trainer.steps} of a small model: {told(terms)}")


def tell_estimate(found: Estimate, images: int, precision: str, device: torch.device) -> None:
    """Print weights, memory, and the least time that an epoch of so many images takes."""
    from ..training.estimate import product_rate

    rate = product_rate(device, precision)
    hours = found.flops * images / rate / 3600
    say(
        f"{found.learned / 1e6:.1f} million weights learn, {found.frozen / 1e6:.1f} million are "
        f"frozen: {found.resting_bytes / 2**30:.2f} GiB before the first picture"
    )
    say(
        f"{found.flops / 1e12:.3g} TFLOP per picture; a matrix product reaches {rate / 1e12:.3g} "
        f"TFLOP/s here ({precision}), so an epoch takes at least {hours:.3g} hours (predicted)"
    )
