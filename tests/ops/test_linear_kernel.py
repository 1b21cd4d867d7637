"""Triton's activations of linear against float64, on a GPU if there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from where_kernels_run import DEVICE, HALVES, in_the_interpreter, runs

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.reference.linear import linear as reference

pytest.importorskip("triton")
from vfmtok_fast.kernels import linear as kernel

pytestmark = pytest.mark.usefixtures("poison")


test_in_the_interpreter = in_the_interpreter(__file__)


def make(*rows: int, K: int = 5, N: int = 33, dtype=torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((*rows, K), (N, K), (N,))
    return [torch.randn(shape, generator=draw).to(dtype).to(DEVICE) for shape in shapes]


@runs
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("activation", [None, "gelu", "relu", "swiglu"])
def test_results_and_gradients(activation, dtype: torch.dtype, check_error, record):
    launches = record(kernel, "_gelu", "_gelu_backward")
    parts = make(4, 70, N=34, dtype=dtype)

    def gradients(function, dtype: torch.dtype) -> list[Tensor]:
        given = [part.detach().to(dtype).requires_grad_() for part in parts]
        out = function(*given, activation)
        grad = torch.linspace(-1, 1, out.numel(), device=DEVICE).to(parts[0].dtype).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, given, grad.view(out.shape))]

    got = gradients(kernel.linear, dtype)
    truth, ruler = gradients(reference, torch.float64), gradients(reference, dtype)
    for one in zip(got, truth, ruler, strict=True):
        check_error(*one)
    expected = int(activation == "gelu")
    assert [len(recorder.launches) for recorder in launches.values()] == [expected, expected]


@runs
def test_in_place_without_gradients(record, check_error):
    launches = record(kernel, "_gelu")["_gelu"].launches
    parts = make(3, 50)
    with torch.no_grad(), vfmtok_fast.enable("linear", strict=True):
        got = ops.linear(*parts, activation="gelu")
    assert vfmtok_fast.status().ops["linear"].calls == {"triton": 1}
    assert launches[0][0] is launches[0][1]
    check_error(got, reference(*(p.double() for p in parts), "gelu"), reference(*parts, "gelu"))
    assert kernel.linear(*make(0), "gelu").shape == (0, 33)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("rows", "N"), [((3, 5), 66), ((40,), 602)])
def test_gate(rows: tuple, N: int, dtype: torch.dtype, check_error, record):
    launches = record(kernel, "_gate")["_gate"].launches
    parts = make(*rows, N=N, dtype=dtype)
    with torch.no_grad(), vfmtok_fast.enable("linear", strict=True):
        got = ops.linear(*parts, activation="swiglu")
    assert len(launches) == 1 and got.shape == (*rows, N // 2)
    truth = reference(*(p.double() for p in parts), "swiglu")
    check_error(got, truth, reference(*parts, "swiglu"))
    assert kernel.linear(*make(0, N=N), "swiglu").shape == (0, N // 2)


@runs
def test_values_of_every_kind(check_error):
    z = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([1e-30, -1e30, 1e30])]).to(DEVICE)
    got = torch.ops.vfmtok_fast.gelu_triton(z)
    gelu = torch.nn.functional.gelu
    check_error(got[:4001], gelu(z[:4001].double()), gelu(z[:4001]))
    # Expected values follow the formula: torch's vectorised CPU code turns infinity into NaN.
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0], device=DEVICE)
    want = torch.tensor([float("nan"), float("inf"), float("nan"), 0.0], device=DEVICE)
    got = torch.ops.vfmtok_fast.gelu_triton(odd)
    torch.testing.assert_close(got, want, equal_nan=True)


@runs
def test_opcheck_and_first_derivatives_only():
    z = torch.randn(3, 5, device=DEVICE)
    torch.library.opcheck(torch.ops.vfmtok_fast.gelu_in_place_triton.default, (z.clone(),))
    z.requires_grad_()
    torch.library.opcheck(torch.ops.vfmtok_fast.gelu_triton.default, (z,))
    out = torch.ops.vfmtok_fast.gelu_triton(z).square().sum()
    (grad,) = torch.autograd.grad(out, z, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()


def test_what_it_cannot_take():
    x = torch.zeros(2, 3)
    assert kernel.unsupported_reason(x, x, None, None) is None
    assert "not torch.float64" in kernel.unsupported_reason(x.double(), x.double(), None, None)
