"""The ways in which golden cases of generators run: one for each implementation of a step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import vfmtok_fast

WAYS = ["reference", "cpu", pytest.param("triton", marks=pytest.mark.gpu)]
# All ops that a decoding step calls.
STEP = ("decode_step", "decode_attention")


def enabled(way: str) -> contextlib.AbstractContextManager:
    """Enable the implementations of ``way`` only: cpu on a CPU, Triton on a GPU."""
    if way == "reference":
        return contextlib.nullcontext()
    return vfmtok_fast.enable((*STEP, "sample_token"), strict=True)


@contextlib.contextmanager
def on(model: nn.Module, way: str) -> Iterator[torch.device]:
    """Keep a model on the device of ``way`` inside the context."""
    device = torch.device("cuda" if way == "triton" else "cpu")
    model.to(device)
    try:
        yield device
    finally:
        model.cpu()
