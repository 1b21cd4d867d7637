"""What the tests of Triton kernels share.

They run on a GPU where there is one, else in Triton's interpreter, see `run_in_interpreter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

import vfmtok_fast


@pytest.fixture(scope="module", params=["reference", "portable"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def taking(implementation: str) -> Callable[[str], Iterator[None]]:
    """``yield from taking("op")``: calls of that op take ``implementation``, and only that."""

    def take(op: str) -> Iterator[None]:
        if implementation == "portable":
            vfmtok_fast.enable(op, strict=True)
        yield
        # A fixture of a wider scope than `clean_switch` would be undone before the test begins.
        assert (op in vfmtok_fast.switch.policy().ops) == (implementation == "portable")
        took = set(vfmtok_fast.status().ops[op].calls)
        assert took <= {implementation, f"{implementation} (compiled)"}

    return take


@pytest.fixture(scope="session")
def check_error() -> Callable[..., None]:
    """``check_error(got, truth, ruler)``: no further off than twice the ruler, and one rounding.

    The tolerance rule of all ops: ``truth`` is in float64, ``ruler`` the reference in the type.
    """

    def check(got: Tensor, truth: Tensor, ruler: Tensor) -> None:
        assert got.shape == truth.shape and got.dtype == ruler.dtype
        error, allowed = (float((x - truth).abs().max()) for x in (got, ruler))
        rounding = torch.finfo(got.dtype).eps * float(truth.abs().max())
        assert error <= 2 * allowed + rounding, f"off by {error:.2e}, the reference {allowed:.2e}"

    return check


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


@pytest.fixture
def check_rounding() -> Callable[..., None]:
    """``check_rounding(op, *tensors)``: enabled, it errs at most twice as much as its reference.

    The truth is the reference in float64; one rounding of the result is free (DESIGN.md, 7).
    ``took`` is the implementation that must have been taken.
    """

    def check(op: Callable, *tensors: Tensor, took: str = "portable", **kwargs) -> None:
        truth = op(*(tensor.double() for tensor in tensors), **kwargs)
        ruler = op(*tensors, **kwargs)
        before = vfmtok_fast.status().ops[op.__name__].calls.get(took, 0)
        with vfmtok_fast.enable(op.__name__, strict=True):
            got = op(*tensors, **kwargs)
        assert vfmtok_fast.status().ops[op.__name__].calls[took] == before + 1
        assert got.dtype == ruler.dtype and got.shape == ruler.shape and got.is_contiguous()
        rounding = torch.finfo(got.dtype).eps * float(truth.abs().max())
        allowed = 2 * float((ruler - truth).abs().max()) + rounding
        assert float((got - truth).abs().max()) <= allowed

    return check


@pytest.fixture(scope="session")
def exact_gumbel() -> Callable[[Tensor], Tensor]:
    """``exact_gumbel(word)``: the noise of sample_token in float64, from the reference's own u."""

    def noise(word: Tensor) -> Tensor:
        u = ((word.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
        return -torch.log(-torch.log1p(-u.double()))

    return noise
