"""Triton's add_norm against float64, on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from where_kernels_run import DEVICE, HALVES, in_the_interpreter, runs

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.reference.add_norm import add_norm as reference

pytest.importorskip("triton")
from vfmtok_fast.kernels import add_norm as kernel

pytestmark = pytest.mark.usefixtures("poison")
EPS = 1e-6
HALF = HALVES[-1]
# Dtypes of the stream, the branch, the parameters and the normalised output.
DTYPES = [(torch.float32,) * 4, (HALF,) * 4, (torch.float32, HALF, torch.float32, HALF)]


test_in_the_interpreter = in_the_interpreter(__file__)


def make(shape: tuple[int, ...], dtypes: tuple, scaled: bool) -> list[Tensor | None]:
    draw = torch.Generator().manual_seed(0)
    stream, branch, weight, _ = dtypes
    sizes = ((shape, stream), (shape, branch), *[(shape[-1:], weight)] * 3)
    parts = [torch.randn(size, generator=draw).to(dtype).to(DEVICE) for size, dtype in sizes]
    return parts if scaled else [*parts[:4], None]


def results(function, parts: list[Tensor | None], dtype, grads: list[Tensor]) -> list[Tensor]:
    """Return both outputs and the gradients of all given tensors."""
    parts = [None if part is None else part.detach().requires_grad_() for part in parts]
    out = function(*parts, EPS, dtype)
    given = [part for part in parts if part is not None]
    grads = [grad.to(one.dtype) for grad, one in zip(grads, out, strict=True)]
    return [*(one.detach() for one in out), *torch.autograd.grad(out, given, grads)]


@runs
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 33), (5, 1), (1, 512), (4, 1024)])
def test_results_and_gradients(
    shape, dtypes: tuple, scaled: bool, check_error, record, monkeypatch
):
    monkeypatch.setattr(kernel, "PARTS", 2)
    launches = record(kernel, "_add_norm", "_add_norm_backward")
    parts, dtype = make(shape, dtypes, scaled), dtypes[3]
    grads = [
        torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in (1, 2)
    ]
    grads = [grad.to(one) for grad, one in zip(grads, (dtypes[0], dtype), strict=True)]
    got = results(kernel.add_norm, parts, dtype, grads)
    truth = results(
        reference, [p if p is None else p.double() for p in parts], torch.float64, grads
    )
    ruler = results(reference, parts, dtype, grads)
    assert all(len(recorder.launches) == 1 for recorder in launches.values())
    for one in zip(got, truth, ruler, strict=True):
        check_error(*one)


@runs
def test_through_the_switch_and_opcheck():
    parts = make((3, 40), DTYPES[0], True)
    with vfmtok_fast.enable("add_norm", strict=True):
        ops.add_norm(*parts[:4], scale=parts[4], eps=EPS)
    assert vfmtok_fast.status().ops["add_norm"].calls == {"triton": 1}
    for part in parts:
        part.requires_grad_()
    torch.library.opcheck(
        torch.ops.vfmtok_fast.add_norm_triton.default, (*parts, EPS, torch.float32)
    )


@runs
def test_strides_empty_input_and_what_is_not_finite():
    parts = make((6, 40), DTYPES[0], True)
    strided = [p if p.ndim == 1 else p.T.contiguous().T for p in parts]
    want = kernel.add_norm(*parts, EPS, torch.float32)
    assert all(map(torch.equal, kernel.add_norm(*strided, EPS, torch.float32), want))
    parts[0][2, 3] = float("nan")
    total, normed = kernel.add_norm(*parts, EPS, torch.float32)
    assert normed[2].isnan().all() and int(normed.isnan().sum()) == 40
    assert int(total.isnan().sum()) == 1
    empty = [parts[0][:0], parts[1][:0], *parts[2:]]
    grads = [torch.empty(0, 40, device=DEVICE)] * 2
    got = results(kernel.add_norm, empty, torch.float32, grads)
    assert got[0].shape == (0, 40) and all(not one.any() for one in got[2:])


@runs
def test_gradients_have_the_same_bits_every_time_and_first_derivatives_only():
    parts = make((7, 33), DTYPES[0], True)
    grads = [torch.ones(7, 33, device=DEVICE)] * 2
    first, second = (results(kernel.add_norm, parts, torch.float32, grads) for _ in range(2))
    assert all(map(torch.equal, first, second))
    x = parts[0].requires_grad_()
    out = kernel.add_norm(x, *parts[1:], EPS, torch.float32)[1]
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        grad.sum().backward()


def test_what_it_cannot_take():
    x, vector = torch.zeros(2, 8), torch.zeros(8)
    args = (x, x, vector, vector, None, EPS, torch.float32)
    assert kernel.unsupported_reason(*args) is None
    assert "not torch.float64" in kernel.unsupported_reason(x.double(), *args[1:])
    long = torch.zeros(1, 8193)
    assert "not 8193" in kernel.unsupported_reason(long, long, long[0], long[0], *args[4:])
