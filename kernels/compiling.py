"""Compile what a call would launch, without launching it, for a chip that need not be there.

`compile_only` lets every launch in its block end before it reaches a device: Triton binds and
specialises the arguments as ever and compiles for the chip that was asked for. `make aot` reads the
machine code of what was launched; `tune` fills Triton's cache from processes that have no GPU.
Tensors may be on any device, and their values are never looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from . import tuning


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, how many programs, and what was compiled."""

    kernel: str
    programs: int
    compiled: Any


class _Driver:
    """What Triton asks of a driver before it launches."""

    def __init__(self, chip: int):
        self.target = GPUTarget("cuda", chip, 32)

    def get_current_device(self) -> str:
        # A key of Triton's tables of compiled kernels: never that of a device.
        return f"sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compile_only(chip: int) -> Iterator[list[Launch]]:
    """Compile for compute capability ``chip`` (90 for 9.0); collects what would be launched.

    Changes Triton for the whole process while it lasts, so it is not for threads that launch.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def dry_run(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        programs = 1
        for size in grid:
            programs *= size
        launches.append(Launch(self.__name__, programs, compiled))
        return compiled

    before = driver._active
    driver.set_active(_Driver(chip))
    JITFunction.run = dry_run
    try:
        with tuning.pretend(chip):
            yield launches
    finally:
        JITFunction.run = run
        driver._active = before
