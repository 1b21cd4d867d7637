"""linear_cross_entropy: reference and CPU implementation against float64, gradients, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vfmtok_fast import ops
from vfmtok_fast.cpu import linear_cross_entropy as cpu
from vfmtok_fast.reference.linear_cross_entropy import linear_cross_entropy as reference

REDUCTIONS = ["mean", "sum", "none"]
IGNORED = -100


@pytest.fixture(autouse=True)
def fast(taking, monkeypatch):
    # Chunks of 128 rows, the minimum.
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    yield from taking("linear_cross_entropy")


def make(N: int = 300, C: int = 24, V: int = 37, dtype=torch.float32) -> list[Tensor]:
    """Return x, weight, bias, and targets of which every seventh is ignored."""
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(s, generator=draw).to(dtype) for s in ((N, C), (V, C), (V,))]
    targets = torch.randint(V, (N,), generator=draw)
    targets[::7] = IGNORED
    return [*parts, targets]


def results(function, parts: list[Tensor], targets: Tensor, **options) -> list[Tensor]:
    """Return the loss and all gradients, for an output gradient that is not 1."""
    parts = [part.detach().requires_grad_() for part in parts]
    x, weight, bias = (*parts, None)[:3]
    loss = function(x, weight, targets, bias=bias, **options)
    grad = torch.linspace(-1.5, 2, loss.numel(), dtype=torch.float64).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, parts, grad.view(loss.shape))]


def plain(
    x, weight, targets, bias=None, ignore_index=IGNORED, label_smoothing=0.0, reduction="mean"
):
    """The reference with the op's argument names."""
    return reference(x, weight, targets, bias, ignore_index, label_smoothing, reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("biased", [True, False])
def test_against_float64(biased, smoothing, reduction, dtype, check_error):
    *parts, targets = make(dtype=dtype)
    parts = parts if biased else parts[:2]
    options = {"label_smoothing": smoothing, "reduction": reduction}
    got = results(ops.linear_cross_entropy, parts, targets, **options)
    truth = results(plain, [part.double() for part in parts], targets, **options)
    ruler = results(plain, parts, targets, **options)
    assert got[0].dtype == torch.float32
    for one in zip(got, truth, ruler, strict=True):
        check_error(*one)


def test_the_reference_is_torch():
    x, weight, bias, targets = make()
    want = F.cross_entropy(F.linear(x, weight, bias).float(), targets)
    assert torch.equal(reference(x, weight, targets, bias, IGNORED, 0.0, "mean"), want)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_very_large_logits(size: float, check_error):
    *parts, targets = make(C=1, N=150)
    parts[1] = torch.linspace(-1, 1, 37)[:, None] * size
    got = results(ops.linear_cross_entropy, parts, targets, reduction="none")
    truth = results(plain, [part.double() for part in parts], targets, reduction="none")
    for one, exact, ruler in zip(
        got, truth, results(plain, parts, targets, reduction="none"), strict=True
    ):
        assert one.isfinite().all()
        check_error(one, exact, ruler)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("N", [0, 5])
def test_no_row_that_counts(N: int, reduction: str):
    """Like torch, the mean over no rows is NaN, but no gradient is NaN."""
    *parts, targets = make(N)
    targets.fill_(IGNORED)
    loss, *grads = results(ops.linear_cross_entropy, parts, targets, reduction=reduction)
    assert torch.equal(loss.isnan(), torch.full_like(loss, reduction == "mean").bool())
    assert loss.shape == ((N,) if reduction == "none" else ())
    assert [grad.shape for grad in grads] == [part.shape for part in parts]
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("learning", [(0,), (1,), (2,), (0, 2), ()])
def test_gradients_only_of_what_learns(learning: tuple[int, ...], reduction: str):
    *parts, targets = make(20)
    for i in learning:
        parts[i].requires_grad_()
    x, weight, bias = parts
    loss = ops.linear_cross_entropy(x, weight, targets, bias=bias, reduction=reduction)
    want = plain(x, weight, targets, bias, reduction=reduction)
    assert loss.requires_grad == bool(learning)
    if learning:
        grads = [
            torch.autograd.grad(one.sum(), [parts[i] for i in learning]) for one in (loss, want)
        ]
        for got, exact in zip(*grads, strict=True):
            torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck(reduction: str, smoothing: float):
    *parts, targets = make(9, C=3, V=5, dtype=torch.float64)
    parts = [part.requires_grad_() for part in parts]

    def loss(x, weight, bias, factor):
        # The factor is the gradient of the loss, so it is neither 1 nor constant.
        one = ops.linear_cross_entropy(
            x, weight, targets, bias=bias, label_smoothing=smoothing, reduction=reduction
        )
        return one * factor

    for factor in (1.0, 0.0, -2.5):
        assert torch.autograd.gradcheck(loss, (*parts, torch.tensor(factor).double()))
    if reduction == "none":
        assert torch.autograd.gradcheck(loss, (*parts, torch.linspace(-1, 2, 9).double()))


def test_another_ignored_index_strides_and_integers():
    x, weight, bias, targets = make(50)
    want = ops.linear_cross_entropy(x, weight, targets, bias=bias)
    targets = targets.masked_fill(targets == IGNORED, 38)
    strided = x.T.contiguous().T, weight.T.contiguous().T, targets.repeat_interleave(2)[::2]
    got = ops.linear_cross_entropy(*strided, bias=bias, ignore_index=38)
    torch.testing.assert_close(got, want)
    got = ops.linear_cross_entropy(x, weight, targets.to(torch.uint16), bias=bias, ignore_index=38)
    torch.testing.assert_close(got, want)


def test_the_same_bits_every_time():
    *parts, targets = make()
    first, second = (results(ops.linear_cross_entropy, parts, targets) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_first_derivatives_only(reduction: str, implementation: str):
    x, weight, _, targets = make(9)
    x.requires_grad_()
    # A sum, whose own gradient is constant: nothing of the incoming gradient requires one.
    loss = ops.linear_cross_entropy(x, weight, targets, reduction=reduction).sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    if implementation == "reference":
        grad.square().sum().backward()
        assert float(x.grad.abs().max()) > 0
        return
    with pytest.raises(NotImplementedError, match="^linear_cross_entropy: .* first derivatives"):
        (loss + grad.square().sum()).backward()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(reduction: str):
    *parts, targets = make(40)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(ops.linear_cross_entropy, parts, targets, reduction=reduction)
        want = results(plain, parts, targets, reduction=reduction)
    assert [one.dtype for one in got] == [torch.float32] * 4
    for one, exact in zip(got, want, strict=True):
        torch.testing.assert_close(one, exact, rtol=2**-7, atol=2**-7)


def curve(loss, dtype: torch.dtype) -> Tensor:
    """Losses of 300 SGD steps on a layer and its output layer, with products in ``dtype``."""
    draw = torch.Generator().manual_seed(1)
    given, targets = torch.randn(160, 8, generator=draw), torch.randint(40, (160,), generator=draw)
    layers = [torch.randn(s, generator=draw).requires_grad_() for s in ((16, 8), (40, 16))]
    losses = []
    for _ in range(300):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(F.linear(given, layers[0]).relu(), layers[1], targets)
        losses.append(value.detach())
        for layer, grad in zip(layers, torch.autograd.grad(value, layers), strict=True):
            layer.data -= 0.3 * grad
    return torch.stack(losses)


@pytest.mark.slow
def test_learns_in_half_precision_as_with_logits_in_float32():
    """Liger-Kernel's issue 512: a weight gradient accumulated in half precision diverges."""
    exact, ruler = curve(plain, torch.float32), curve(plain, torch.bfloat16)
    got = curve(ops.linear_cross_entropy, torch.bfloat16)
    assert exact[-1] < 0.7 * exact[0]
    allowed = 2 * (ruler - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.max()
    assert (got - exact).abs().max() <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiles(reduction: str):
    *parts, targets = make(30)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    got = results(compiled, parts, targets, **options)
    for one, want in zip(
        got, results(ops.linear_cross_entropy, parts, targets, **options), strict=True
    ):
        torch.testing.assert_close(one, want)


def test_holds_the_logits_of_few_rows(monkeypatch, implementation: str):
    """The CPU implementation creates no tensor of [N, V]; the reference does."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else (out,):
                if isinstance(one, Tensor):
                    self.seen = max(self.seen, one.untyped_storage().nbytes())
            return out

    *parts, targets = make(1024, V=64)
    for reduction in REDUCTIONS:
        with Largest() as largest:
            results(ops.linear_cross_entropy, parts, targets, reduction=reduction)
        few = implementation == "cpu"
        assert (largest.seen <= max(128 * 64, 1024 * 24) * 4) == few


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"x": torch.zeros(2, 4)}, ValueError, r"x must have shape \(2, 3\), got \(2, 4\)"),
        ({"x": torch.zeros(2, 1, 3)}, ValueError, r"x must have shape \[N, C\]"),
        ({"weight": torch.zeros(0, 3)}, ValueError, "weight must have at least one row"),
        ({"weight": torch.zeros(4, 3).double()}, TypeError, "weight must be torch.float32"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(4,\)"),
        ({"targets": torch.zeros(2)}, TypeError, "targets must hold integers"),
        ({"targets": torch.tensor([0, 4])}, ValueError, r"targets must be in \[0, 4\), got 4"),
        ({"targets": torch.tensor([-1, 3])}, ValueError, r"targets must be in \[0, 4\), got -1"),
        ({"targets": torch.tensor([0])}, ValueError, r"targets must have shape \(2,\)"),
        ({"ignore_index": 0.5}, TypeError, "ignore_index must be an int, got float"),
        ({"label_smoothing": 1.1}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.1"),
        ({"label_smoothing": None}, TypeError, "label_smoothing must be a number"),
        ({"reduction": "all"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'all'"),
    ],
)
def test_errors(change: dict, error: type, message: str):
    given = {"x": torch.zeros(2, 3), "weight": torch.zeros(4, 3), "targets": torch.tensor([0, 3])}
    given |= change
    with pytest.raises(error, match=f"^linear_cross_entropy: .*{message}"):
        ops.linear_cross_entropy(given.pop("x"), given.pop("weight"), given.pop("targets"), **given)
