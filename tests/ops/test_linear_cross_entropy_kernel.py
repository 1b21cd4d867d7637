"""Triton's linear_cross_entropy against float64, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from where_kernels_run import DEVICE, GPU, HALVES, in_the_interpreter, runs

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.reference.linear_cross_entropy import linear_cross_entropy as reference

pytest.importorskip("triton")
from vfmtok_fast.kernels import linear_cross_entropy as kernel

pytestmark = pytest.mark.usefixtures("poison")
IGNORED = -100


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Use chunks of 128 rows, the minimum."""
    monkeypatch.setattr(kernel, "CHUNK_BYTES", 1)


def make(N: int = 150, C: int = 24, V: int = 37, dtype=torch.float32) -> list[Tensor]:
    """Return x, weight, bias, and targets of which every seventh is ignored."""
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(s, generator=draw).to(dtype).to(DEVICE) for s in ((N, C), (V, C), (V,))]
    targets = torch.randint(V, (N,), generator=draw)
    targets[::7] = IGNORED
    return [*parts, targets.to(DEVICE)]


def results(function, parts, targets, smoothing=0.0, reduction="mean") -> list[Tensor]:
    """Return the loss and all gradients, for an output gradient that is not 1."""
    parts = [part.detach().requires_grad_() for part in parts]
    x, weight, bias = (*parts, None)[:3]
    loss = function(x, weight, targets, bias, IGNORED, smoothing, reduction)
    grad = torch.linspace(-1.5, 2, loss.numel(), dtype=torch.float64).to(loss)
    return [loss.detach(), *torch.autograd.grad(loss, parts, grad.view(loss.shape))]


@runs
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("V", "held"), [(37, True), (64, True), (37, False)])
def test_results_and_gradients(
    V, held, smoothing, reduction, dtype, check_error, record, monkeypatch
):
    if not held:
        monkeypatch.setattr(kernel, "HELD_LOGITS", 16)
    launches = record(kernel, "_cross_entropy", "_scale")
    *parts, targets = make(V=V, dtype=dtype)
    # With and without a bias.
    parts = parts if held else parts[:2]
    got = results(kernel.linear_cross_entropy, parts, targets, smoothing, reduction)
    truth = results(reference, [p.double() for p in parts], targets, smoothing, reduction)
    ruler = results(reference, parts, targets, smoothing, reduction)
    late = reduction == "none"
    assert len(launches["_cross_entropy"].launches) == (4 if late else 2)
    assert len(launches["_scale"].launches) == (0 if late else len(parts))
    assert {c["HELD"] for c in launches["_cross_entropy"].constants} == {held}
    for one in zip(got, truth, ruler, strict=True):
        check_error(*one)


@runs
def test_several_chunks_of_half_precision_add_up_in_float32(check_error):
    """More chunks must not cost precision."""
    *parts, targets = make(1024, C=8, dtype=HALVES[-1])
    got = results(kernel.linear_cross_entropy, parts, targets)
    truth = results(reference, [part.double() for part in parts], targets)
    for one in zip(got, truth, results(reference, parts, targets), strict=True):
        check_error(*one)


@runs
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_very_large_logits(size: float, held: bool, check_error, monkeypatch):
    if not held:
        monkeypatch.setattr(kernel, "HELD_LOGITS", 16)
    *parts, targets = make(9, C=1)
    parts[1] = torch.linspace(-1, 1, 37, device=DEVICE)[:, None] * size
    got, truth, ruler = (
        results(function, given, targets, 0.1, "none")
        for function, given in (
            (kernel.linear_cross_entropy, parts),
            (reference, [part.double() for part in parts]),
            (reference, parts),
        )
    )
    for one, exact, rounded in zip(got, truth, ruler, strict=True):
        assert one.isfinite().all()
        check_error(one, exact, rounded)


@runs
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("N", [0, 5])
def test_no_row_that_counts(N: int, reduction: str):
    *parts, targets = make(N)
    targets.fill_(IGNORED)
    loss, *grads = results(
        kernel.linear_cross_entropy, parts, targets, reduction=reduction, smoothing=0.1
    )
    assert torch.equal(loss.isnan(), torch.full_like(loss, reduction == "mean").bool())
    assert [grad.shape for grad in grads] == [part.shape for part in parts]
    assert not any(grad.any() for grad in grads)


@runs
@pytest.mark.parametrize("held", [True, False])
def test_a_target_that_is_no_code_makes_nan_and_reads_nothing(held: bool, monkeypatch):
    if not held:
        monkeypatch.setattr(kernel, "HELD_LOGITS", 16)
    *parts, targets = make(5)
    targets[1], targets[2] = 37, -1
    losses, by_x, by_weight, _ = results(
        kernel.linear_cross_entropy, parts, targets, reduction="none"
    )
    wrong = torch.tensor([False, True, True, False, False], device=DEVICE)
    assert torch.equal(losses.isnan(), wrong) and torch.equal(by_x.isnan().all(1), wrong)
    assert by_weight.isnan().all()


@runs
def test_without_gradients_and_with_some():
    x, weight, bias, targets = make(20)
    with torch.no_grad():
        plain = kernel.linear_cross_entropy(x, weight, targets, bias, IGNORED, 0.0, "mean")
    for learning in ([x], [weight], [bias], [x, bias]):
        for part in learning:
            part.requires_grad_()
        for reduction in ("mean", "none"):
            loss, want = (
                function(x, weight, targets, bias, IGNORED, 0.0, reduction)
                for function in (kernel.linear_cross_entropy, reference)
            )
            got = torch.autograd.grad(loss.sum(), learning)
            for one, exact in zip(got, torch.autograd.grad(want.sum(), learning), strict=True):
                torch.testing.assert_close(one, exact)
        assert reduction == "mean" or loss.shape == (20,)
        for part in learning:
            part.requires_grad_(False)
    assert not plain.requires_grad


@runs
def test_the_same_bits_every_time_for_any_strides():
    *parts, targets = make()
    strided = [part.T.contiguous().T for part in parts[:2]]
    first, *others = (
        results(kernel.linear_cross_entropy, given, targets)
        for given in (parts, parts, [*strided, parts[2]])
    )
    for other in others:
        assert all(map(torch.equal, first, other))


@runs
def test_through_the_switch_under_autocast_and_opcheck():
    x, weight, bias, targets = make(20)
    parts = [part.requires_grad_() for part in (x, weight, bias)]
    half = HALVES[-1] if GPU else torch.float16
    with (
        vfmtok_fast.enable("linear_cross_entropy", strict=True),
        torch.autocast(DEVICE, half),
    ):
        loss = ops.linear_cross_entropy(x, weight, targets, bias=bias)
    assert vfmtok_fast.status().ops["linear_cross_entropy"].calls == {"triton": 1}
    want = ops.linear_cross_entropy(x, weight, targets, bias=bias)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, want, rtol=2**-7, atol=2**-7)
    for got, exact in zip(
        torch.autograd.grad(loss, parts), torch.autograd.grad(want, parts), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact, rtol=2**-6, atol=2**-7)
    for reduction in ("mean", "none"):
        torch.library.opcheck(
            torch.ops.vfmtok_fast.linear_cross_entropy_triton.default,
            (x, weight, targets, bias, IGNORED, 0.1, reduction, [reduction == "mean"] * 3),
        )


@runs
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_first_derivatives_only(reduction: str):
    x, weight, _, targets = make(9)
    x.requires_grad_()
    loss = kernel.linear_cross_entropy(x, weight, targets, None, IGNORED, 0.0, reduction)
    (grad,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        (loss.sum() + grad.square().sum()).backward()


@runs
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles(reduction: str):
    *parts, targets = make(20)
    compiled = torch.compile(kernel.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    got, want = (
        results(function, parts, targets, 0.1, reduction)
        for function in (compiled, kernel.linear_cross_entropy)
    )
    for one, exact in zip(got, want, strict=True):
        torch.testing.assert_close(one, exact)


@runs
@pytest.mark.skipif(not GPU, reason="captures a CUDA graph")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_a_cuda_graph(reduction: str):
    *parts, targets = make(300, dtype=torch.bfloat16)
    want = results(kernel.linear_cross_entropy, parts, targets, reduction=reduction)
    parts = [part.requires_grad_() for part in parts]

    def call() -> list[Tensor]:
        x, weight, bias = parts
        loss = kernel.linear_cross_entropy(x, weight, targets, bias, IGNORED, 0.0, reduction)
        grad = torch.linspace(-1.5, 2, loss.numel(), device=DEVICE).view(loss.shape)
        return [loss, *torch.autograd.grad(loss, parts, grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    graph.replay()
    for one, exact in zip(got, want, strict=True):
        torch.testing.assert_close(one, exact, rtol=2**-7, atol=2**-9)


def test_what_it_cannot_take():
    x, targets = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    rest = (targets, None, IGNORED, 0.0, "mean")
    assert kernel.unsupported_reason(x, x, *rest) is None
    assert "not torch.float64" in kernel.unsupported_reason(x.double(), x.double(), *rest)
