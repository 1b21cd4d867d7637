"""Where a test runs Triton kernels: on a GPU, or in the interpreter of a child pytest.

`run_in_interpreter` of tests/conftest.py starts the child; tests marked with `runs` run there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence

import pytest
import torch

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
# For torch.compile: tracing and capture are the same, and nothing is compiled for a CPU.
BACKEND = "inductor" if GPU else "aot_eager"
# Bfloat16 products are wrong in the interpreter but right on a GPU.
HALVES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
HERE = pytest.mark.skipif(not INTERPRETED, reason="runs in the child pytest")
runs = pytest.mark.gpu if GPU else HERE
_starts_child = pytest.mark.skipif(GPU or INTERPRETED, reason="the tests below run here")


def combined(*choices: Sequence) -> list[tuple]:
    """Return all combinations of several parameters on a GPU, else each value at least once."""
    if GPU:
        return list(itertools.product(*choices))
    count = max(map(len, choices))
    return [tuple(values[i % len(values)] for values in choices) for i in range(count)]


def in_the_interpreter(file: str) -> Callable[..., None]:
    """Return a test that runs a file's kernel tests in a child pytest; see tests/conftest.py."""

    @pytest.mark.slow
    @_starts_child
    def test(run_in_interpreter: Callable[..., None]) -> None:
        run_in_interpreter(file)

    return test
