"""linear: reference and CPU implementation against float64, gradients, autocast, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vfmtok_fast import ops
from vfmtok_fast.cpu import linear as cpu
from vfmtok_fast.reference.linear import linear as reference

ACTIVATIONS = [None, "gelu", "relu"]


@pytest.fixture(autouse=True)
def fast(taking):
    yield from taking("linear")


needs_bfloat16 = pytest.mark.skipif(
    not cpu.BFLOAT16, reason="this processor has no instructions for bfloat16"
)
BFLOAT16 = pytest.param(torch.bfloat16, marks=needs_bfloat16)


def make(*rows: int, K: int = 24, N: int = 17, dtype=torch.float32) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=draw).to(dtype) for s in ((*rows, K), (N, K), (N,))]


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biased", [True, False])
def test_against_float64(activation, biased: bool, dtype: torch.dtype, check_error):
    x, weight, bias = make(3, 11, dtype=dtype)
    bias = bias if biased else None
    got = ops.linear(x, weight, bias, activation=activation)
    truth = reference(
        x.double(), weight.double(), bias if bias is None else bias.double(), activation
    )
    check_error(got, truth, reference(x, weight, bias, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("rows", "K", "N"), [((0,), 3, 2), ((4,), 0, 3), ((2, 3), 5, 0), ((), 4, 1)]
)
def test_any_shape(rows: tuple, K: int, N: int, activation):
    x, weight, bias = make(*rows, K=K, N=N)
    got = ops.linear(x, weight, bias, activation=activation)
    torch.testing.assert_close(got, reference(x, weight, bias, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_strides_and_what_is_not_finite(activation):
    x, weight, bias = make(5)
    strided = (x.T.contiguous().T, weight.T.contiguous().T, bias.repeat_interleave(2)[::2])
    want = ops.linear(x, weight, bias, activation=activation)
    torch.testing.assert_close(ops.linear(*strided, activation=activation), want)
    x[1, 2], x[3, 0] = float("nan"), float("inf")
    got, want = (
        ops.linear(x, weight, bias, activation=activation),
        reference(x, weight, bias, activation),
    )
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_gate(dtype: torch.dtype, check_error):
    """The gate is silu of the first half times the second."""
    draw = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=draw).to(dtype) for shape in ((3, 7, 5), (12, 5), (12,))
    )
    gate, up = (x.double() @ weight.double().T + bias.double()).chunk(2, dim=-1)
    got = ops.linear(x, weight, bias, activation="swiglu")
    check_error(got, gate * gate.sigmoid() * up, reference(x, weight, bias, "swiglu"))
    with pytest.raises(ValueError, match="'swiglu' halves the outputs, got 11"):
        ops.linear(x, weight[:11], None, activation="swiglu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("trained", [(0,), (1, 2), (0, 1, 2)])
def test_gradients(activation, trained: tuple[int, ...], check_error):
    def gradients(dtype: torch.dtype, function) -> list[Tensor]:
        parts = [part.to(dtype) for part in make(2, 9)]
        for i in trained:
            parts[i].requires_grad_()
        out = function(*parts)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape)
        return torch.autograd.grad(out, [parts[i] for i in trained], weights)

    plain = lambda *parts: reference(*parts, activation)  # noqa: E731
    got = gradients(torch.float32, lambda *parts: ops.linear(*parts, activation=activation))
    truth, ruler = gradients(torch.float64, plain), gradients(torch.float32, plain)
    for one in zip(got, truth, ruler, strict=True):
        check_error(*one)


@needs_bfloat16
def test_autocast_casts_as_torchs_own_layer_does():
    x, weight, bias = make(5)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = ops.linear(x, weight, bias), F.linear(x, weight, bias)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want)


def test_what_onednn_cannot_take_is_said(monkeypatch):
    """The private op exists in torch 2.11 and 2.14, but not without oneDNN."""
    assert torch.ops.mkldnn._linear_pointwise is not None
    x, weight, bias = make(5)
    assert "not torch.float64" in cpu.unsupported_reason(x.double(), weight, bias, None)
    monkeypatch.setattr(cpu, "AVAILABLE", False)
    assert "built without oneDNN" in cpu.unsupported_reason(x, weight, bias, None)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must have shape \(2, 24\), got \(2, 3\)"),
        ({"weight": torch.zeros(24)}, ValueError, r"weight must have shape \[N, K\]"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(17,\)"),
        ({"bias": torch.zeros(17).half()}, TypeError, "bias must be torch.float32"),
        ({"x": torch.zeros(2, 24).int()}, TypeError, "x must be floating point"),
        (
            {"activation": "silu"},
            ValueError,
            "activation must be None, 'gelu', 'relu' or 'swiglu', got 'silu'",
        ),
    ],
)
def test_errors(change: dict, error: type, message: str):
    arguments = dict(zip(("x", "weight", "bias"), make(2), strict=True)) | change
    with pytest.raises(error, match=f"^linear: {message}"):
        ops.linear(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_compiles(trained: bool):
    x, weight, bias = make(4)
    weight.requires_grad_(trained)
    call = lambda x: ops.linear(x, weight, bias, activation="gelu")  # noqa: E731
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, call(x))
    assert got.requires_grad == trained


@pytest.mark.slow
def test_inductor_takes_it_too():
    """Inductor's own lowering rejects oneDNN's product if the weights are not known constants."""
    x, weight, bias = make(4)
    weight.requires_grad_()
    call = lambda x: ops.linear(x, weight, bias)  # noqa: E731
    got, expected = torch.compile(call, fullgraph=True)(x), call(x)
    torch.testing.assert_close(got, expected)
    grads = (torch.autograd.grad(y.square().sum(), weight)[0] for y in (got, expected))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "swiglu"])
def test_no_second_derivative_is_lost(activation, implementation: str):
    """A gradient penalty counts, or is refused in words: of a sum too, whose gradient is plain."""
    x, weight, bias = (part.requires_grad_() for part in make(5, N=16))
    out = ops.linear(x, weight, bias, activation=activation).sum()
    grads = torch.autograd.grad(out, (x, weight), create_graph=True)
    penalty = sum(grad.square().sum() for grad in grads)
    if implementation == "reference":
        penalty.backward()
        assert x.grad is not None and weight.grad is not None
        return
    with pytest.raises(NotImplementedError, match="^linear: its CPU code has first derivatives"):
        (out + penalty).backward()
