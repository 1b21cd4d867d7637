"""norm_linear: against a norm and a product in float64."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.ops import norm_linear

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def normal(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 9, 33])
def test_agrees(check_rounding, rows, dtype):
    x, norm, weight = normal((rows, 64), (64,), (300, 64), dtype=dtype)
    wide = x.double()
    wide = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.double()
    got = norm_linear(x, norm, weight)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # x, its norm and the product are rounded once each.
    size = float(wide.norm(dim=1).max() * weight.double().norm(dim=1).max())
    assert (got.double() - wide @ weight.double().T).abs().max() <= (
        4 * torch.finfo(dtype).eps * size
    )
    check_rounding(norm_linear, x, norm, weight)


@pytest.mark.parametrize(
    ("eps", "error"),
    [(None, TypeError), ("a", TypeError), (-1.0, ValueError), (math.nan, ValueError)],
)
@pytest.mark.parametrize("fast", [False, True])
def test_eps_is_checked_by_all_that_normalise(eps, error, fast):
    x, weight = torch.ones(2, 4), torch.ones(12, 4)
    caches = torch.zeros(2, 2, 1, 3, 4)
    calls = {
        "norm_linear": lambda: norm_linear(x, x[0], weight, eps=eps),
        "gate_up": lambda: ops.gate_up(x, x[0], weight, weight, eps=eps),
        "qkv_rotary": lambda: ops.qkv_rotary(
            x, x[0], weight, torch.ones(3, 2, 2), *caches, 0, eps=eps
        ),
    }
    for name, call in calls.items():
        with vfmtok_fast.enable(name) if fast else contextlib.nullcontext():
            with pytest.raises(error, match=f"^{name}: eps must be"):
                call()


def test_eps_counts(check_rounding):
    x, norm, weight = normal((3, 32), (32,), (50, 32), dtype=torch.float32)
    x = x * 1e-3
    check_rounding(norm_linear, x, norm, weight, eps=0.5)
    assert norm_linear(x, norm, weight, eps=0.5).abs().max() < 0.1
    assert norm_linear(x, norm, weight).abs().max() > 0.1
    assert not norm_linear(x * 0, norm, weight).any()


X, N, W = normal((2, 8), (8,), (6, 8), dtype=torch.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], N, W), ValueError, r"x must have shape \[B, C\], got \(8,\)"),
        ((X, N[:7], W), ValueError, r"norm_weight must have shape \(8,\), got \(7,\)"),
        ((X, N, W[:, :7]), ValueError, r"weight must have shape \(6, 8\), got \(6, 7\)"),
        ((X, N.double(), W), TypeError, "norm_weight must be torch.float32, as x is, got"),
    ],
)
def test_refuses_in_one_line(arguments, error, message):
    with pytest.raises(error, match=f"^norm_linear: {message}") as caught:
        norm_linear(*arguments)
    assert "\n" not in str(caught.value)
