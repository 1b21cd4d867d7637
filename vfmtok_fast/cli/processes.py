"""Which process of how many this is: under torchrun, under Slurm's srun, or alone."""

from __future__ import annotations

import os
from typing import NamedTuple


class Processes(NamedTuple):
    """This process among those of a job; ``device`` is the one it computes on."""

    rank: int
    world_size: int
    device: str | None


def among_processes(device: str | None) -> Processes:
    """Return rank and world size from the environment; choose this process's GPU if none is named.

    Raises:
        ValueError: a variable is not a number.
    """
    import torch

    rank, world_size, local = (
        _number(name, default) for name, default in zip(_names(), "010", strict=True)
    )
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{local % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    return Processes(rank, world_size, device)


def is_first() -> bool:
    """Whether this process speaks for all of a job."""
    return _number(_names()[0], "0") == 0


def _names() -> tuple[str, str, str]:
    # A batch script's own process has the job's variables but no step's.
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ:
        return "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"
    return "RANK", "WORLD_SIZE", "LOCAL_RANK"


def exit_code(code: int) -> int:
    """Turn exit code 3 into 0 under torchrun, to which any code but 0 is a crash of the job."""
    return 0 if code == 3 and "TORCHELASTIC_RUN_ID" in os.environ else code


def _number(name: str, default: str) -> int:
    value = os.environ.get(name, default)
    if not value.isascii() or not value.isdigit():
        raise ValueError(f"the environment variable {name} must be a number, got {value!r}")
    return int(value)
