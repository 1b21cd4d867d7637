"""What the tests of Triton kernels share.

They run on a GPU where there is one, else in Triton's interpreter. That must be chosen before
Triton is imported, so without a GPU a child pytest runs such a file again with TRITON_INTERPRET=1.
float32 and float16 are right in it; bfloat16 products are not (triton#11584).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture
def run_in_interpreter() -> Callable[[str], None]:
    """``run_in_interpreter(__file__)`` runs that file's kernel tests in a child pytest."""

    def run(file: str) -> None:
        command = [sys.executable, "-P", "-m", "pytest", "--import-mode=importlib", "-q", file]
        result = subprocess.run(
            [*command, "-p", "no:cacheprovider"],
            cwd=Path(file).parents[2],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
        assert " passed" in result.stdout

    return run


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN or -1, so that what a kernel fails to write shows."""

    def poisoned(make: Callable) -> Callable:
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            with torch.no_grad():
                return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


class Recorder:
    """A kernel that notes the arguments of its launches."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.launches: list[tuple] = []
        self.constants: list[dict] = []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append(args)
            self.constants.append(kwargs)
            return self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Recorder]]:
    """``record(module, "_a", "_b")`` makes these kernels note their launches."""

    def install(module: ModuleType, *names: str) -> dict[str, Recorder]:
        recorders = {name: Recorder(getattr(module, name)) for name in names}
        for name, recorder in recorders.items():
            monkeypatch.setattr(module, name, recorder)
        return recorders

    return install
