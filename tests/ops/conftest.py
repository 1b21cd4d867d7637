"""Shared by the tests of ops and kernels.

Tests of Triton kernels run on a GPU if there is one, else in Triton's interpreter; see
`run_in_interpreter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vfmtok_fast


@pytest.fixture(scope="module", params=["reference", "cpu"])
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def taking(implementation: str) -> Callable[[str], Iterator[None]]:
    """``yield from taking("op")``: calls of that op use ``implementation``, and nothing else."""

    def take(op: str) -> Iterator[None]:
        if implementation == "cpu":
            vfmtok_fast.enable(op, strict=True)
        yield
        # In a fixture of wider scope, `clean_switch` would disable the op before the test begins.
        assert (op in vfmtok_fast.switch.policy().ops) == (implementation == "cpu")
        took = set(vfmtok_fast.status().ops[op].calls)
        assert took <= {implementation, f"{implementation} (compiled)"}

    return take


@pytest.fixture(scope="session")
def check_error() -> Callable[..., None]:
    """``check_error(got, truth, ruler)``: at most twice the ruler's error, plus one rounding.

    This is the tolerance rule of all ops, except for float32 sums of linear layers, which use
    `float32_bounds`. ``truth`` is computed in float64; ``ruler`` is the reference in the dtype
    under test.
    """

    def check(got: Tensor, truth: Tensor, ruler: Tensor) -> None:
        assert got.shape == truth.shape and got.dtype == ruler.dtype
        error, allowed = (float((x - truth).abs().max()) for x in (got, ruler))
        rounding = torch.finfo(got.dtype).eps * float(truth.abs().max())
        assert error <= 2 * allowed + rounding, f"off by {error:.2e}, the reference {allowed:.2e}"

    return check


# Unit roundoff of float32, and the largest slope of silu, which it has at 2.4.
U, SLOPE = 2.0**-24, 1.0999


def gamma(roundings: int) -> float:
    """Largest relative error of a product of this many factors (1 + d), |d| <= U.

    Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., lemma 3.1.
    """
    return roundings * U / (1 - roundings * U)


@pytest.fixture(scope="session")
def float32_bounds() -> Callable[..., list[Tensor]]:
    """``float32_bounds(part, wide, roundings, position)``: error bound of each float32 element.

    The bounds cover everything that the linear layers of a decoding step write. They are derived,
    not taken from a comparison: a library's sum may be more exact than a plain one, because of its
    order or by luck.

    A computed sum of products is the exact sum of x_k w_k (1 + e_k), |e_k| <= gamma(n), if no
    product passes through more than n roundings, in whatever order (Higham, section 3.1). So its
    error is at most gamma(n) sum |x_k w_k|. Roundings of factors that all products share, such as
    RMSNorm's scale, are included in n. The few roundings after the sums are added separately.

    Args:
        part: "queries", "add", "hidden" or "logits".
        wide: x, the norm's weight, the weight and what else the part reads, in float64.
        roundings: the kernel's n, including the roundings of RMSNorm.
    """

    def bounds(part: str, wide: list[Tensor], roundings: int, position: int = 3) -> list[Tensor]:
        if part == "add":
            x, weight, residual = wide
            return [gamma(roundings + 1) * (x.abs() @ weight.abs().T + residual.abs())]
        x, norm, weight, *rest = wide
        x = x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm
        total, off = x @ weight.T, gamma(roundings) * (x.abs() @ weight.abs().T)
        if part == "logits":
            return [off]
        if part == "hidden":
            (total, up), (off, off_up) = total.chunk(2, dim=-1), off.chunk(2, dim=-1)
            gate, off_gate = F.silu(total), SLOPE * off
            # The exponential's argument is rounded twice, so its value is off by 2 |g|. The rest,
            # which includes the approximate exponential and the division, adds 8 at most.
            own = (2 * total.abs() + 8) * U
            most = (gate.abs() + off_gate) * (up.abs() + off_up)
            return [most * (1 + own) - gate.abs() * up.abs()]
        table = rest[0][position].double()
        cos, sin = table.abs().unbind(-1)
        rows, half = x.shape[0], table.shape[0]
        even, odd = total.view(rows, 3, -1, half, 2).abs().unbind(-1)
        off_even, off_odd = off.view(rows, 3, -1, half, 2).unbind(-1)
        # Each product is rounded, and so is their sum.
        one = off_even * cos + off_odd * sin
        one = one + gamma(2) * ((even + off_even) * cos + (odd + off_odd) * sin)
        two = off_odd * cos + off_even * sin
        two = two + gamma(2) * ((odd + off_odd) * cos + (even + off_even) * sin)
        turned = torch.stack([one, two], -1).flatten(-2)
        return [turned[:, 0], turned[:, 1], off.view(rows, 3, -1, 2 * half)[:, 2]]

    return bounds


@pytest.fixture(scope="session")
def check_bound() -> Callable[..., None]:
    """``check_bound(got, truth, bound)``: every element of a float32 result is within its bound."""

    def check(got: Tensor, truth: Tensor, bound: Tensor) -> None:
        assert got.shape == truth.shape == bound.shape and got.dtype == torch.float32
        share = (got - truth).abs() / bound.clamp(min=torch.finfo(torch.float32).tiny)
        assert not share.isnan().any(), "NaN"
        assert float(share.max()) <= 1, f"off by {float(share.max()):.2f} times the bound"

    return check


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new memory with NaN or -1, which exposes what a kernel fails to write."""

    def poisoned(make: Callable) -> Callable:
        def filled(*args, **kwargs):
            tensor = make(*args, **kwargs)
            with torch.no_grad():
                return tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

        return filled

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


class Recorder:
    """Wraps a kernel and records the arguments of its launches."""

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
    """``record(module, "_a", "_b")`` makes these kernels record their launches."""

    def install(module: ModuleType, *names: str) -> dict[str, Recorder]:
        recorders = {name: Recorder(getattr(module, name)) for name in names}
        for name, recorder in recorders.items():
            monkeypatch.setattr(module, name, recorder)
        return recorders

    return install


@pytest.fixture
def check_rounding() -> Callable[..., None]:
    """``check_rounding(op, *tensors)``: an enabled op's error is at most twice the reference's.

    The truth is the reference in float64; one rounding of the result is allowed on top. ``took`` is
    the implementation that the call must use.
    """

    def check(op: Callable, *tensors: Tensor, took: str = "cpu", **kwargs) -> None:
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
