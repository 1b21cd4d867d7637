"""linear_residual: against a product in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vfmtok_fast.ops import linear_residual

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def normal(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 33])
@pytest.mark.parametrize(("N", "K"), [(48, 64), (7, 1200)])
def test_agrees(check_rounding, N, K, rows, dtype):
    x, weight, residual = normal((rows, K), (N, K), (rows, N), dtype=dtype)
    want = residual.double() + torch.einsum("bk,nk->bn", x.double(), weight.double())
    got = linear_residual(x, weight, residual)
    # A product of K terms, rounded once each and once at the end, and the sum's rounding.
    size = float(x.double().norm(dim=1).max() * weight.double().norm(dim=1).max()) + 10
    assert (got.double() - want).abs().max() <= 2 * torch.finfo(dtype).eps * size
    check_rounding(linear_residual, x, weight, residual)


def test_strides_do_not_matter(check_rounding):
    """A transposed x, as attention may hand over, and a weight that is a view."""
    x, weight, residual = normal((64, 4), (64, 96), (4, 96), dtype=torch.float32)
    check_rounding(linear_residual, x.T, weight.T, residual)


def test_no_rows(check_rounding):
    x, weight, residual = normal((0, 8), (6, 8), (0, 6), dtype=torch.float32)
    assert linear_residual(x, weight, residual).shape == (0, 6)


X, W, R = normal((2, 8), (6, 8), (2, 6), dtype=torch.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], W, R), ValueError, r"x must have shape \[B, K\], got \(8,\)"),
        ((X, W[:, :7], R), ValueError, r"weight must have shape \(6, 8\), got \(6, 7\)"),
        ((X, W, R[:1]), ValueError, r"residual must have shape \(2, 6\), got \(1, 6\)"),
        ((X, W.half(), R), TypeError, "weight must be torch.float32, as x is, got torch.float16"),
        ((X, W, R.to("meta")), ValueError, "residual must be on cpu, as x is, got meta"),
        ((X.long(), W, R), TypeError, "x must be floating point, got torch.int64"),
    ],
)
def test_refuses_in_one_line(arguments, error, message):
    with pytest.raises(error, match=f"^linear_residual: {message}") as caught:
        linear_residual(*arguments)
    assert "\n" not in str(caught.value)
