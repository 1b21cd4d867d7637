"""upsample_conv: one transposed convolution equals nearest x2 and a 3x3 convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vfmtok_fast
from vfmtok_fast.ops import upsample_conv


def make(B=2, C=3, O=5, H=4, W=6, seed=0, dtype=torch.float64) -> list[Tensor]:  # noqa: E741
    draw = torch.Generator().manual_seed(seed)
    shapes = (B, C, H, W), (O, C, 3, 3), (O,)
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def fast(*arguments: Tensor) -> Tensor:
    with vfmtok_fast.enable("upsample_conv", strict=True):
        out = upsample_conv(*arguments)
        assert "cpu" in vfmtok_fast.status().ops["upsample_conv"].calls
    return out


@settings(max_examples=30, deadline=None)
@given(
    B=st.integers(0, 2), C=st.integers(1, 4), O=st.integers(1, 4), H=st.integers(1, 5),
    W=st.integers(1, 5), seed=st.integers(0, 99), last=st.booleans(),
)  # fmt: skip
def test_both_are_the_formula(B, C, O, H, W, seed, last):  # noqa: E741
    x, weight, bias = make(B, C, O, H, W, seed)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    want = F.conv2d(large, weight, bias, padding=1)
    for got in (upsample_conv(x, weight, bias), fast(x, weight, bias)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        assert got.shape == (B, O, 2 * H, 2 * W)


def test_gradients():
    arguments = [x.requires_grad_() for x in make(H=3, W=2)]
    assert torch.autograd.gradcheck(upsample_conv, arguments)
    assert torch.autograd.gradcheck(fast, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_off_than_the_reference(dtype, check_error):
    """The weights are summed first and rounded once more, but the error limit holds."""
    arguments = make(C=64, O=32, H=9, W=9, dtype=dtype)
    truth = upsample_conv(*(x.double() for x in arguments))
    check_error(fast(*arguments), truth, upsample_conv(*arguments))


def test_torch_compile():
    arguments = make(dtype=torch.float32)
    with vfmtok_fast.enable("upsample_conv", strict=True):
        compiled = torch.compile(upsample_conv, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), fast(*arguments))


def test_a_weight_that_is_changed_in_place_counts_at_once():
    x, weight, bias = make()
    before = fast(x, weight, bias)
    weight.mul_(2)
    torch.testing.assert_close(fast(x, weight, bias), 2 * before - bias[:, None, None])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(3, 4, 4)}, ValueError, r"x must have shape \[B, C, H, W\]"),
        ({1: torch.zeros(5, 4, 3, 3)}, ValueError, r"weight must have shape \(5, 3, 3, 3\)"),
        ({1: torch.zeros(5, 3, 1, 1)}, ValueError, r"weight must have shape \(5, 3, 3, 3\)"),
        ({2: torch.zeros(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({2: torch.zeros(5, dtype=torch.float16)}, TypeError, "bias must be torch.float32"),
    ],
)
def test_refuses(change, error, message):
    arguments = [change.get(i, x) for i, x in enumerate(make(dtype=torch.float32))]
    with pytest.raises(error, match=f"^upsample_conv: {message}"):
        upsample_conv(*arguments)
