"""What launches share: the device they go to, and whether a step's kernels may overlap."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

# Let a kernel of a decoding step begin while the one before it ends (programmatic dependent launch,
# from sm_90 on): it asks for its weights, then waits. Off until measured on a GPU (README.md).
OVERLAP = False


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which may be another one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def overlap() -> dict[str, bool]:
    """Arguments of a kernel that can overlap with its neighbours."""
    return {"OVERLAP": True, "launch_pdl": True} if OVERLAP else {"OVERLAP": False}


@triton.jit
def _let_next_begin():
    """From now on the next kernel may start, up to where it waits for this one to end."""
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _wait_for_last():
    """Wait until the kernel before has ended.

    Only from here on may be read what it wrote, and written what it read.
    """
    tl.extra.cuda.gdc_wait()
