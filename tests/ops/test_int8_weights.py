"""The four ops of linear layers with int8 weights: against the weights in full, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.portable import linear as portable_linear

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
OPS = ["linear_residual", "gate_up", "norm_linear", "qkv_rotary"]
H, T, D = 3, 5, 12


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def int8(N: int, K: int, seed: int) -> tuple[Tensor, Tensor]:
    """A weight whose rows have length about one, both of its extremes in the first."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    weight[0] = torch.where(torch.arange(K) % 3 == 0, -127, 127)
    scale = torch.rand(N, generator=generator) + 0.5
    return weight, scale / (73 * K**0.5)


def run(op: str, dtype: torch.dtype, rows: int, K: int, N: int, wide: bool = False) -> list[Tensor]:
    """What the op writes; ``wide``: of the weights in full instead, float64."""

    def weights(**named: tuple[int, int, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        made, scales = {}, {}
        for name, shape in named.items():
            weight, scale = int8(*shape)
            if wide:
                made[name] = weight.double() * scale.double()[:, None]
            else:
                made[name], scales[name.replace("qkv_", "").replace("weight", "scale")] = (
                    weight,
                    scale,
                )
        return made, scales

    # Of the type's own values, so that all have the same input.
    kind = torch.float64 if wide else dtype
    x, norm = (normal(*s, seed=i).to(dtype).to(kind) for i, s in enumerate(((rows, K), (K,))))
    if op == "linear_residual":
        residual = normal(rows, N, seed=5).to(dtype).to(kind)
        made, scales = weights(weight=(N, K, 2))
        return [ops.linear_residual(x, made["weight"], residual, **scales)]
    if op == "gate_up":
        made, scales = weights(gate_weight=(N, K, 2), up_weight=(N, K, 3))
        return [ops.gate_up(x, norm, made["gate_weight"], made["up_weight"], **scales)]
    if op == "norm_linear":
        made, scales = weights(weight=(N, K, 2))
        return [ops.norm_linear(x, norm, made["weight"], **scales)]
    angle = normal(T, D // 2, seed=4)
    rotary = torch.stack([angle.cos(), angle.sin()], dim=-1).float()
    caches = [torch.full((rows, H, T, D), 7.0, dtype=kind) for _ in range(2)]
    made, scales = weights(qkv_weight=(3 * H * D, K, 2))
    q = ops.qkv_rotary(x, norm, made["qkv_weight"], rotary, *caches, 3, **scales)
    assert all(bool((cache[:, :, :3] == 7).all()) for cache in caches)
    return [q, *(cache[:, :, 3] for cache in caches)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "K", "N"), [(1, 64, 40), (4, 96, 300), (5, 37, 17), (33, 64, 5)])
@pytest.mark.parametrize("op", OPS)
def test_rounds_no_worse_than_the_reference(op, rows, K, N, dtype, check_error):
    """The reference of full float64 weights is the truth; K = 37 is no multiple of 32."""
    truth, ruler = run(op, dtype, rows, K, N, wide=True), run(op, dtype, rows, K, N)
    with vfmtok_fast.enable(op, strict=True):
        got = run(op, dtype, rows, K, N)
    assert vfmtok_fast.status().ops[op].calls == {"reference": 2, "portable": 1}
    for one, exact, reference in zip(got, truth, ruler, strict=True):
        # The reference rounds each weight, its input and its sum: 2^-8 of values about 1 each time.
        spread = float(exact.abs().max())
        assert float((reference - exact).abs().max()) <= 16 * torch.finfo(dtype).eps * spread
        if dtype == torch.float64:  # The truth itself, up to the order of its sums.
            torch.testing.assert_close(one, exact, rtol=1e-12, atol=1e-12)
        else:
            check_error(one, exact, reference)


@pytest.mark.parametrize("K", [32, 33, 48, 64])
def test_only_rows_of_whole_words_go_to_torchs_kernel(K, monkeypatch):
    """It reads past the end of others."""
    took = []
    kernel = torch._weight_int8pack_mm

    def counted(*args: Tensor) -> Tensor:
        took.append(args)
        return kernel(*args)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", counted)
    weight, scale = int8(6, K, 0)
    x = normal(2, K, seed=1).bfloat16()
    assert portable_linear.linear(x, weight, scale).shape == (2, 6)
    assert len(took) == (K % 32 == 0)
    portable_linear.linear(x.float(), weight, scale)
    assert len(took) == (K % 32 == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["part of rows", "every other value", "transposed"])
def test_strides_do_not_matter(layout, dtype, check_error):
    x, residual = (normal(2, 64, seed=seed).to(dtype) for seed in (0, 1))
    wide, scale = int8(64, 128, 2)
    weight = {
        "part of rows": wide[:, :64], "every other value": wide[:, ::2],
        "transposed": wide[:, :64].T,
    }[layout]  # fmt: skip
    full = weight.double() * scale.double()[:, None]
    truth = ops.linear_residual(x.double(), full, residual.double())
    ruler = ops.linear_residual(x, weight, residual, scale=scale)
    with vfmtok_fast.enable("linear_residual", strict=True):
        check_error(ops.linear_residual(x, weight, residual, scale=scale), truth, ruler)


@pytest.mark.parametrize("op", OPS)
def test_no_rows(op):
    for policy in (None, op):
        handle = vfmtok_fast.enable(op, strict=True) if policy else None
        for dtype in (torch.bfloat16, torch.float32):
            assert all(len(one) == 0 for one in run(op, dtype, 0, 64, 8))
        if handle:
            handle.close()


def test_float16_does_not_overflow_where_the_product_does_not():
    """127 * 500 * 64 would, without the scale."""
    weight, scale = torch.full((4, 64), 127, dtype=torch.int8), torch.full((4,), 1e-3)
    x, residual = torch.full((2, 64), 500.0).half(), torch.zeros(2, 4).half()
    want = 64 * 500 * 0.127
    for policy in ((), "linear_residual"):
        with vfmtok_fast.enable(policy):
            got = ops.linear_residual(x, weight, residual, scale=scale)
        assert torch.allclose(got, torch.full((2, 4), want).half(), rtol=2e-3)


W, S = int8(6, 8, 0)
X, N, R = normal(2, 8, seed=1).float(), normal(8, seed=2).float(), normal(2, 6, seed=3).float()


@pytest.mark.parametrize(
    ("weight", "scale", "error", "message"),
    [
        (W, None, TypeError, "an int8 weight must have a float32 scale, got NoneType"),
        (W, S.half(), TypeError, "an int8 weight must have a float32 scale, got torch.float16"),
        (W, S[:5], ValueError, r"the scale of weight must have shape \(6,\), got \(5,\)"),
        (W, S.to("meta"), ValueError, "the scale of weight must be on cpu, as x is, got meta"),
        (W.to("meta"), S, ValueError, "weight must be on cpu, as x is, got meta"),
        (W[:, :7], S, ValueError, r"weight must have shape \(6, 8\), got \(6, 7\)"),
        (W[0], S, ValueError, r"weight must have shape \[., .\], got \(8,\)"),
        (W.float(), S, TypeError, "only an int8 weight has a scale, it is torch.float32"),
        (W.to(torch.uint8), S, TypeError, "weight must be floating point, got torch.uint8"),
    ],
)
def test_refuses_in_one_line(weight, scale, error, message):
    calls = {
        "linear_residual": lambda: ops.linear_residual(X, weight, R, scale=scale),
        "norm_linear": lambda: ops.norm_linear(X, N, weight, scale=scale),
    }
    for name, call in calls.items():
        with pytest.raises(error, match=f"^{name}: {message}") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_each_weight_has_its_own_scale():
    with pytest.raises(TypeError, match="^gate_up: an int8 up_weight must have a float32 scale"):
        ops.gate_up(X, N, W, W, gate_scale=S)
    with pytest.raises(TypeError, match="^gate_up: only an int8 gate_weight has a scale"):
        ops.gate_up(X, N, W.float(), W, gate_scale=S, up_scale=S)
    mixed = ops.gate_up(X, N, W.float() * S[:, None], W, up_scale=S)
    both = ops.gate_up(X, N, W, W, gate_scale=S, up_scale=S)
    torch.testing.assert_close(mixed, both)
