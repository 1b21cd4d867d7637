"""What launches share: the device they go to, and whether a step's kernels overlap."""

from __future__ import annotations

import contextlib
import ctypes
import functools

import torch
import triton
import triton.language as tl

from . import tuning

# Whether a kernel of a decoding step may begin while the one before it ends (programmatic dependent
# launch): it asks for its weights, then waits. None: where the chip can, from sm_90 on; False:
# nowhere; then `switch.new_generation` has graphs captured anew. decode_step/README.md says
# why this is safe, and `make aot` looks for it in the machine code.
OVERLAP: bool | None = None


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which may be another one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _can_overlap(device: torch.device) -> bool:
    if tuning.pretending():
        return tuning.capability(device) >= 90
    # Graphs have had edges for this since CUDA 12.3; torch runs with older drivers too.
    return device.type == "cuda" and tuning.capability(device) >= 90 and _driver_version() >= 12030


@functools.cache
def _driver_version() -> int:
    """Of CUDA, 12030 for 12.3; 0 where there is none."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def overlap(device: torch.device) -> dict[str, bool]:
    """Arguments of a kernel that can overlap with its neighbours."""
    wanted = _can_overlap(device) if OVERLAP is None else OVERLAP
    return {"OVERLAP": True, "launch_pdl": True} if wanted else {"OVERLAP": False}


@triton.jit
def _let_next_begin():
    """From now on the next kernel may start, up to where it waits for this one to end.

    Best called after `_wait_for_last`. Before it is safe too, for the next kernel waits itself, but
    kernels queue up by five to seven then, and those that wait hold the room of those that work.
    GPT-L, one image, on an H200: 218 ms so, 151 ms after the wait, 176 ms without overlap.
    """
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _wait_for_last():
    """Wait until the kernel before has ended.

    Only from here on may be read what it wrote, and written what it read.
    """
    tl.extra.cuda.gdc_wait()
