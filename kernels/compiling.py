"""Compile what a call would launch, without launching it, for a chip that need not be present.

Inside `compile_only`, every launch ends before it reaches a device: Triton binds and specialises
the arguments as usual and compiles for the requested chip. `make aot` reads the machine code of
these launches; `tune` fills Triton's cache from processes without a GPU. Tensors may be on any
device, and their values are never read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from . import tuning


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name, the number of programs, and the compiled kernel."""

    kernel: str
    programs: int
    compiled: Any


class _Driver:
    """The driver interface that Triton uses before a launch."""

    def __init__(self, chip: int):
        self.target = GPUTarget("cuda", chip, 32)

    def get_current_device(self) -> str:
        # Triton uses this as a key for compiled kernels; it must never equal that of a real device.
        return f"sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def compile_only(chip: int) -> Iterator[list[Launch]]:
    """Compile for compute capability ``chip`` (90 for 9.0) and collect what would be launched.

    This patches Triton for the whole process while the block runs, so no other thread may launch.
    """
    launches: list[Launch] = []
    run = JITFunction.run

    def dry_run(self, *args, grid, warmup, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        launches.append(Launch(self.__name__, math.prod(grid), compiled))
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
