"""gate_up: against SwiGLU in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vfmtok_fast.ops import gate_up

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def normal(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 9, 33])
def test_agrees(check_rounding, rows, dtype):
    x, norm, gate, up = normal((rows, 64), (64,), (96, 64), (96, 64), dtype=dtype)
    gate, up = gate / 8, up / 8
    wide = x.double()
    wide = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.double()
    a, b = wide @ gate.double().T, wide @ up.double().T
    want = a / (1 + (-a).exp()) * b
    # silu's slope is at most 1.1; each factor errs like a product of the rounded norm.
    size = float(wide.norm(dim=1).max() * gate.double().norm(dim=1).max())
    bound = 8 * torch.finfo(dtype).eps * size * float(a.abs().max() + b.abs().max())
    assert (gate_up(x, norm, gate, up).double() - want).abs().max() <= bound
    check_rounding(gate_up, x, norm, gate, up)


X, N, G = normal((2, 8), (8,), (6, 8), dtype=torch.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], N, G, G), ValueError, r"x must have shape \[B, C\], got \(8,\)"),
        ((X, N[:7], G, G), ValueError, r"norm_weight must have shape \(8,\), got \(7,\)"),
        ((X, N, G[:, :7], G), ValueError, r"gate_weight must have shape \(6, 8\), got"),
        ((X, N, G, G[:5]), ValueError, r"up_weight must have shape \(6, 8\), got \(5, 8\)"),
        ((X, N, G, G.half()), TypeError, "up_weight must be torch.float32, as x is, got"),
    ],
)
def test_refuses_in_one_line(arguments, error, message):
    with pytest.raises(error, match=f"^gate_up: {message}") as caught:
        gate_up(*arguments)
    assert "\n" not in str(caught.value)
