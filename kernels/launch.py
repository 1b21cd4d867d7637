"""Launch helpers shared by the kernels: the target device, and overlap within a step."""

from __future__ import annotations

import contextlib
import ctypes
import functools

import torch
import triton
import triton.language as tl

from . import tuning

# Whether a kernel of a decoding step may start while the previous one is still finishing
# (programmatic dependent launch): it requests its weights, then waits. None: if the chip supports
# it, from sm_90 on; False: never. After a change, `switch.new_generation` causes graphs to be
# captured again. decode_step/README.md explains why this is safe, and `make aot` checks the machine
# code.
OVERLAP: bool | None = None


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make ``device`` current for a Triton launch, which goes to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _can_overlap(device: torch.device) -> bool:
    # CUDA graphs have supported this since CUDA 12.3; torch also runs with older drivers.
    there = device.type == "cuda" and _driver_version() >= 12030
    return tuning.capability(device) >= 90 and (there or tuning.pretending())


@functools.cache
def _driver_version() -> int:
    """CUDA version that the driver supports, 12030 for 12.3; 0 if there is no driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def overlap(device: torch.device) -> dict[str, bool]:
    """Launch arguments for a kernel that can overlap with its neighbours."""
    wanted = _can_overlap(device) if OVERLAP is None else OVERLAP
    return {"OVERLAP": True, "launch_pdl": True} if wanted else {"OVERLAP": False}


@triton.jit
def _let_next_begin():
    """Let the next kernel start; it runs up to the point where it waits for this one to end.

    Best called after `_wait_for_last`. Calling it earlier is safe too, because the next kernel
    waits itself. But then five to seven kernels queue up, and the waiting ones occupy resources
    that the working ones need. GPT-L, one image, on an H200: 218 ms if called before the wait,
    151 ms after it, 176 ms without overlap.
    """
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _wait_for_last():
    """Wait until the previous kernel has ended.

    Only after this call may a kernel read what the previous one wrote, or write what it read.
    """
    tl.extra.cuda.gdc_wait()
