"""qkv_rotary: against complex rotation in float64, and what it leaves alone in the caches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vfmtok_fast
from vfmtok_fast.ops import qkv_rotary

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def normal(*shapes: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def make(B=3, H=2, T=5, D=8, C=24, dtype=torch.float32) -> list[Tensor]:
    x, norm, weight = normal((B, C), (C,), (3 * H * D, C), dtype=dtype)
    angle = torch.randn(T + 1, D // 2, generator=torch.Generator().manual_seed(1))
    rotary = torch.stack([angle.cos(), angle.sin()], dim=-1)
    caches = [torch.full((B, H, T, D), float("nan"), dtype=dtype) for _ in range(2)]
    return [x, norm, weight, rotary, *caches]


def oracle(x, norm, weight, rotary, k_cache, v_cache, position) -> list[Tensor]:
    """q, k, v [B, H, D] in float64."""
    (B, H, _, D), wide = k_cache.shape, x.double()
    wide = wide / (wide.square().mean(1, keepdim=True) + 1e-5).sqrt() * norm.double()
    q, k, v = (wide @ weight.double().T).view(B, 3, H, D).unbind(1)
    turn = torch.complex(*rotary[position].double().unbind(-1))
    q, k = (
        torch.view_as_real(torch.complex(a[..., ::2], a[..., 1::2]) * turn).flatten(-2)
        for a in (q, k)
    )
    return [q, k, v]


@pytest.mark.parametrize("fast", [False, True], ids=["reference", "portable"])
@pytest.mark.parametrize("tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "D"), [(1, 8), (2, 60), (9, 64)])
def test_matches_the_oracle_and_writes_one_position(B, D, dtype, tensor, fast):
    for position in (0, 3, 4):
        inputs = make(B=B, D=D, dtype=dtype)
        want = oracle(*inputs, position)
        given = torch.tensor([position]) if tensor else position
        with vfmtok_fast.enable(["qkv_rotary"] if fast else [], strict=True):
            q = qkv_rotary(*inputs, given)
        took = vfmtok_fast.status().ops["qkv_rotary"].calls
        assert ("portable" in took) == fast
        k_cache, v_cache = inputs[4:]
        assert q.dtype == dtype and q.shape == want[0].shape
        # The norm, the product, the rotation and the store round once each.
        size = float(inputs[0].double().norm(dim=1).max() * inputs[2].double().norm(dim=1).max())
        bound = 16 * torch.finfo(dtype).eps * size
        got = [q, k_cache[:, :, position], v_cache[:, :, position]]
        for name, one, truth in zip("qkv", got, want, strict=True):
            assert (one.double() - truth).abs().max() <= bound, name
        others = [t for t in range(5) if t != position]
        assert k_cache[:, :, others].isnan().all() and v_cache[:, :, others].isnan().all()


@pytest.mark.parametrize("fast", [False, True], ids=["reference", "portable"])
def test_the_class_position_vanishes(fast):
    """The release stores cos = sin = 0 for it: q and k are zero, v is not."""
    inputs = make()
    inputs[3][0] = 0
    with vfmtok_fast.enable(["qkv_rotary"] if fast else []):
        q = qkv_rotary(*inputs, 0)
    assert not q.any() and not inputs[4][:, :, 0].any() and inputs[5][:, :, 0].all()


@pytest.mark.parametrize("fast", [False, True], ids=["reference", "portable"])
def test_a_few_rows_of_a_larger_cache(fast):
    """As guidance leaves it: a slice of the batch, written through to the whole."""
    x, norm, weight, rotary, k, v = make(B=2)
    large_k, large_v = torch.zeros(4, 2, 5, 8), torch.zeros(4, 2, 5, 8)
    with vfmtok_fast.enable(["qkv_rotary"] if fast else []):
        q = qkv_rotary(x, norm, weight, rotary, k, v, 2)
        assert torch.equal(q, qkv_rotary(x, norm, weight, rotary, large_k[:2], large_v[:2], 2))
    assert torch.equal(large_k[:2, :, 2], k[:, :, 2]) and torch.equal(large_v[:2, :, 2], v[:, :, 2])
    assert not large_k[2:].any() and not large_v[2:].any()


@pytest.mark.parametrize("fast", [False, True], ids=["reference", "portable"])
def test_a_rotary_table_may_lie_anyhow(fast):
    """Complex numbers need two neighbours at an even place."""
    inputs = make()
    with vfmtok_fast.enable(["qkv_rotary"] if fast else []):
        want = qkv_rotary(*inputs, 2)
        table = inputs[3]
        flat = torch.cat([torch.zeros(1), table.flatten()])
        wide = torch.cat([table.flatten(1), torch.zeros(6, 1)], dim=1)
        for other in (
            table.permute(2, 0, 1).contiguous().permute(1, 2, 0),
            flat[1:].view(table.shape),
            wide[:, :8].unflatten(1, (4, 2)),
        ):
            assert torch.equal(other, table) and torch.equal(
                qkv_rotary(*inputs[:3], other, *inputs[4:], 2), want
            )


@pytest.mark.parametrize("op", ["qkv_rotary", "gate_up", "linear_residual", "norm_linear"], ids=str)
def test_portable_linear_layers_leave_autocast_to_the_reference(op):
    """Of all four ops, as they share the reason."""
    x, norm, weight, rotary, k, v = make(H=1)
    calls = {
        "qkv_rotary": lambda: qkv_rotary(x, norm, weight, rotary, k, v, 2),
        "gate_up": lambda: vfmtok_fast.ops.gate_up(x, norm, weight, weight),
        "linear_residual": lambda: vfmtok_fast.ops.linear_residual(x, weight, x),
        "norm_linear": lambda: vfmtok_fast.ops.norm_linear(x, norm, weight),
    }
    with torch.autocast("cpu", torch.bfloat16):
        with (
            vfmtok_fast.enable([op], strict=True),
            pytest.raises(vfmtok_fast.switch.FallbackError, match=f"^{op}: .*autocast"),
        ):
            calls[op]()


CALLS = {
    "qkv_rotary": lambda x, n, w, r, k, v: qkv_rotary(x, n, w, r, k, v, 2),
    "gate_up": lambda x, n, w, *_: vfmtok_fast.ops.gate_up(x, n, w, w),
    "linear_residual": lambda x, n, w, *_: vfmtok_fast.ops.linear_residual(x, w, x @ w.T),
    "norm_linear": lambda x, n, w, *_: vfmtok_fast.ops.norm_linear(x, n, w),
}


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("op", CALLS)
def test_portable_linear_layers_outside_no_grad(op, rows):
    """Of all four: weights are parameters, which need gradients as they come."""
    x, norm, weight, *rest = make(B=rows)
    want = CALLS[op](x, norm, weight, *rest)
    with vfmtok_fast.enable([op], strict=True):
        got = CALLS[op](x, norm.requires_grad_(), weight.requires_grad_(), *rest)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("op", ["gate_up", "linear_residual", "norm_linear"])
def test_portable_linear_layers_compile_without_graph_breaks(op, rows):
    given = make(B=rows)
    with vfmtok_fast.enable([op], strict=True), torch.no_grad():
        want = CALLS[op](*given)
        compiled = torch.compile(CALLS[op], backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*given), want)


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_rows_of_no_values(rows):
    x, weight, residual = torch.zeros(rows, 0), torch.zeros(5, 0), torch.ones(rows, 5)
    with vfmtok_fast.enable(strict=True):
        assert torch.equal(vfmtok_fast.ops.linear_residual(x, weight, residual), residual)


X, N, W, R, K, V = make()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], N, W, R, K, V, 1), ValueError, r"x must have shape \[B, C\], got \(24,\)"),
        ((X, N[:7], W, R, K, V, 1), ValueError, r"norm_weight must have shape \(24,\), got"),
        ((X, N, W[:9], R, K, V, 1), ValueError, r"qkv_weight must have shape \(48, 24\), got"),
        ((X, N, W, R[:, :3], K, V, 1), ValueError, r"rotary must have shape \(6, 4, 2\), got"),
        ((X, N, W, R, K[:2], V, 1), ValueError, r"k_cache must have shape \(3, 2, 5, 8\), got"),
        ((X, N, W, R, K, V[:, :, :4], 1), ValueError, r"v_cache must have shape \(3, 2, 5, 8\)"),
        ((X, N, W, R, K, V, 5), ValueError, "position must be in 0..4, got 5"),
        ((X, N, W, R, K, V, -1), ValueError, "position must be in 0..4, got -1"),
        ((X, N, W, R, K, V, True), TypeError, "position must be an int or a tensor, got bool"),
        ((X, N, W, R, K, V, torch.tensor([1, 2])), ValueError, "position must have 1 elements"),
        ((X, N, W, R, K, V, torch.tensor(1.0)), TypeError, "position must hold integers, got"),
        ((X, N, W, R, K.half(), V, 1), TypeError, "k_cache must be torch.float32, as x is, got"),
    ],
)
def test_refuses_in_one_line(arguments, error, message):
    with pytest.raises(error, match=f"^qkv_rotary: {message}") as caught:
        qkv_rotary(*arguments)
    assert "\n" not in str(caught.value)
