"""What the tests of Triton kernels share.

They run on a GPU where there is one, else in Triton's interpreter, see `run_in_interpreter`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch


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
