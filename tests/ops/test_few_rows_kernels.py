"""The Triton kernels that share `kernels/few_rows.py`: qkv_rotary, linear_residual, gate_up,
norm_linear.

On a GPU where there is one, else in Triton's interpreter; a child pytest runs them there.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import ops

pytest.importorskip("triton")
from vfmtok_fast.kernels import few_rows, gate_up, launch, linear_residual, norm_linear, qkv_rotary

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
HERE = pytest.mark.skipif(not INTERPRETED, reason="runs in the child pytest")
runs = pytest.mark.gpu if GPU else HERE
pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
# Of each op: its module, the kernel of few rows, and the one beside cuBLAS for many.
KERNELS = {
    "linear_residual": (linear_residual, "_linear_residual", None),
    "gate_up": (gate_up, "_gate_up", "_gate"),
    "norm_linear": (norm_linear, "_norm_linear", None),
    "qkv_rotary": (qkv_rotary, "_qkv_rotary", "_rotary"),
}
H, T, D = 3, 5, 12


@pytest.mark.slow
@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests below run here")
def test_in_the_interpreter(run_in_interpreter):
    run_in_interpreter(__file__)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs(op: str, rows: int, K: int, N: int, dtype: torch.dtype) -> list[Tensor]:
    """Arguments up to the caches, on the CPU; a weight's rows have length about one."""
    x, norm = random(rows, K), random(K, seed=1)
    first, second = (random(N, K, seed=seed) / K**0.5 for seed in (2, 3))
    angle = random(T, D // 2, seed=4)
    rest = {
        "linear_residual": [first, random(rows, N, seed=5)],
        "gate_up": [norm, first, second],
        "norm_linear": [norm, first],
        "qkv_rotary": [norm, random(3 * H * D, K, seed=6) / K**0.5],
    }[op]
    made = [tensor.to(dtype) for tensor in (x, *rest)]
    if op == "qkv_rotary":
        made.append(torch.stack([angle.cos(), angle.sin()], dim=-1).float())
    return made


def call(
    op: str, given: list[Tensor], position: int | Tensor = 3, **scales: Tensor
) -> list[Tensor]:
    """All that the op writes, for qkv_rotary q, and k and v as they stand in the caches."""
    if op != "qkv_rotary":
        return [getattr(ops, op)(*given, **scales)]
    shape = (given[0].shape[0], H, T, D)
    caches = [given[0].new_full(shape, float("nan")) for _ in range(2)]
    q = ops.qkv_rotary(*given, *caches, position, **scales)
    at = int(position)
    others = [t for t in range(T) if t != at]
    assert all(cache[:, :, others].isnan().all() for cache in caches)
    return [q, *(cache[:, :, at] for cache in caches)]


def roundings(op: str, rows: int, weight: Tensor) -> int:
    """The most that a product of the op passes in float32 before what follows the sums.

    Of few rows, a product is added up within its slice of K (a warp's, fused, piece after piece,
    the pieces' ends padded with zeros, which cost nothing), and then the slices. One more is left
    for a product that is not fused, in the interpreter. Of many rows, in any order at all.
    """
    K, slices = weight.shape[1], few_rows.SLICES.value
    inside, squares = K, K
    if rows <= few_rows.MAX_ROWS:
        x = torch.empty(rows, K)
        depth = few_rows.constants(x, weight, pair=op in ("gate_up", "qkv_rotary"))["DEPTH"]
        pieces = -(-K // (slices * depth))
        inside, squares = min(K, pieces * depth), min(K, pieces + slices * depth)
    total = inside + slices + 1
    if weight.dtype == torch.int8:
        total += 1  # Its scale, after the sum or before.
    if op == "linear_residual":
        return total
    # Gain times x, times 1 / rms. Of that: half of the error of the mean (the squares' product and
    # sum, the division by K, eps), and rsqrt's, 2^-22.9 on a GPU (PTX ISA), so less than three.
    return total + 2 + -(-(squares + 3) // 2) + 3


@pytest.fixture
def check(check_error, check_bound, float32_bounds) -> Callable[..., list[Tensor]]:
    """The kernel's results, each checked; the truth is the reference in float64.

    float32 has a bound by the kernel's own roundings, half precision the reference as its ruler.
    """

    def run(
        op: str, given: list[Tensor], position: int | Tensor = 3, *, few: Callable = check_error,
        **scales: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        at, rows = int(position), given[0].shape[0]
        wide = full(op, given, scales)
        truth = call(op, wide, at)
        there = position.to(DEVICE) if isinstance(position, Tensor) else position
        with vfmtok_fast.enable(op, strict=True):
            got = call(
                op, [t.to(DEVICE) for t in given], there,
                **{name: scale.to(DEVICE) for name, scale in scales.items()},
            )  # fmt: skip
        assert vfmtok_fast.status().ops[op].calls["triton"] == 1
        if given[0].dtype == torch.float32:
            n = roundings(op, rows, given[1 if op == "linear_residual" else 2])
            for one, exact, bound in zip(got, truth, float32_bounds(op, wide, n, at), strict=True):
                check_bound(one.cpu(), exact, bound)
        else:
            for one, exact, ruler in zip(got, truth, call(op, given, at, **scales), strict=True):
                few(one.cpu(), exact, ruler)
        return got

    return run


def full(op: str, given: list[Tensor], scales: dict[str, Tensor]) -> list[Tensor]:
    """``given`` in float64, with weights in full; the rotary table stays float32."""
    wide = [t if op == "qkv_rotary" and t is given[3] else t.double() for t in given]
    places = [at for at, tensor in enumerate(given) if tensor.dtype == torch.int8]
    for at, scale in zip(places, scales.values(), strict=True):
        wide[at] = wide[at] * scale.double()[:, None]
    return wide


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 32, 33])
@pytest.mark.parametrize("op", KERNELS)
def test_agrees_within_its_rounding(op, rows, dtype, check, record):
    module, few, many = KERNELS[op]
    kernels = record(module, few, *([many] if many else []))
    check(op, inputs(op, rows, 200, 40, dtype))
    took = {name: len(kernel.launches) for name, kernel in kernels.items()}
    if rows <= few_rows.MAX_ROWS:
        assert took.pop(few) == 1 and not any(took.values())
    else:
        assert took.pop(few) == 0 and all(n == 1 for n in took.values())


def quantized(op: str, given: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """``given`` with int8 in place of the weights, and their scales by the op's names for them."""
    places = {"gate_up": {2: "gate_scale", 3: "up_scale"}, "linear_residual": {1: "scale"}}
    given, scales = list(given), {}
    for place, name in places.get(op, {2: "scale"}).items():
        weight = given[place].double()
        scale = (weight.abs().amax(1) / 127).float()
        scales[name] = scale
        given[place] = (weight / scale[:, None]).round().to(torch.int8)
    return given, scales


@runs
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9, 33])
@pytest.mark.parametrize(("K", "N"), [(37, 17), (600, 40)])
@pytest.mark.parametrize("op", KERNELS)
def test_int8_weights(op, K, N, rows, dtype, check, record):
    """The truth: the weights in full, in float64."""
    module, few, _ = KERNELS[op]
    kernels = record(module, few)
    given, scales = quantized(op, inputs(op, rows, K, N, dtype))
    check(op, given, **scales)
    assert len(kernels[few].launches) == (rows <= few_rows.MAX_ROWS)


@runs
@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize(("K", "N"), [(1, 1), (37, 17), (300, 16), (1024, 5)])
def test_any_shape(op, K, N, check):
    check(op, inputs(op, 2, K, N, torch.float32))


@runs
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    op=st.sampled_from(sorted(KERNELS)), rows=st.integers(1, 40), K=st.integers(1, 90),
    N=st.integers(1, 40), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape_at_all(op, rows, K, N, dtype, check):
    """In half precision, the reference of a few values may be right by luck, so with the kernel's
    own roundings.

    gate_up has most: the norm's three in each of two products, exponential, division, product.
    """

    def few(got: Tensor, exact: Tensor, ruler: Tensor) -> None:
        error, allowed = (float((x - exact).abs().max()) for x in (got, ruler))
        assert error <= 2 * allowed + 8 * torch.finfo(dtype).eps * float(exact.abs().max())

    vfmtok_fast.switch.reset_records()
    check(op, inputs(op, rows, K, N, dtype), few=few)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """To 10 bits after the leading one, to nearest, as the matrix unit's operands are."""
    bits = x.view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


@pytest.mark.skipif(INTERPRETED, reason="runs without a kernel")
@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize(("K", "N"), [(37, 17), (200, 40), (300, 16), (600, 40), (1024, 5)])
def test_the_bound_tells_float32_from_less(op, K, N, check_bound, float32_bounds):
    """float32 sums in one long chain are within it; TF32 products and a lost piece of K are not."""
    given = inputs(op, 2, K, N, torch.float32)
    wide, at = full(op, given, {}), 1 if op == "linear_residual" else 2
    truth = call(op, wide)
    bounds = float32_bounds(op, wide, roundings(op, 2, given[at]))

    def fits(results: list[Tensor]) -> bool:
        try:
            for one, exact, bound in zip(results, truth, bounds, strict=True):
                check_bound(one, exact, bound)
        except AssertionError as error:
            assert "times the bound" in str(error)
            return False
        return True

    assert fits(call(op, given)), "the reference"
    coarse = [rounded_to_tf32(t) if t.ndim == 2 else t for t in given]
    assert not fits([x.float() for x in call(op, full(op, coarse, {}))]), "TF32"
    lost = [t.clone() for t in given]
    lost[at][:, K // 2 : K // 2 + 16] = 0
    assert not fits(call(op, lost)), "16 products of each sum are missing"
    spoilt = call(op, given)
    spoilt[0].view(-1)[0] = float("nan")
    with pytest.raises(AssertionError, match="NaN"):
        check_bound(spoilt[0], truth[0], bounds[0])


@runs
@pytest.mark.parametrize("op", ["gate_up", "norm_linear", "qkv_rotary"])
@pytest.mark.parametrize("size", [3e4, 1e-3])
def test_the_norm_leaves_float16_no_overflow(op, size, check):
    """x times the norm's weight would be infinite, or lose its digits."""
    x, norm, *rest = inputs(op, 2, 64, 16, torch.float32)
    given = [x.clamp(-1, 1) * size, norm * 8, *rest]
    given[:-1] = [t.half() for t in given[:-1]]
    given[-1] = given[-1] if op == "qkv_rotary" else given[-1].half()
    assert all(t.isfinite().all() for t in check(op, given))


@runs
@pytest.mark.parametrize("rows", [2, 33])
@pytest.mark.parametrize("position", [0, 4, torch.tensor([1]), torch.tensor(2, dtype=torch.int32)])
def test_position_on_the_host_or_the_device(position, rows, check):
    check("qkv_rotary", inputs("qkv_rotary", rows, 64, 0, torch.float32), position)


@runs
@pytest.mark.parametrize("rows", [2, 33])
def test_rows_of_a_larger_cache(rows):
    """As guidance leaves it: the rest of the batch stays as it is."""
    given = [t.to(DEVICE) for t in inputs("qkv_rotary", rows, 64, 0, torch.float32)]
    large = [torch.full((rows + 2, H, T, D), 7.0, device=DEVICE) for _ in range(2)]
    small = [torch.full((rows, H, T, D), 7.0, device=DEVICE) for _ in range(2)]
    with vfmtok_fast.enable("qkv_rotary", strict=True):
        q = ops.qkv_rotary(*given, *(cache[:rows] for cache in large), 2)
        assert torch.equal(q, ops.qkv_rotary(*given, *small, 2))
    for whole, part in zip(large, small, strict=True):
        assert torch.equal(whole[:rows], part) and bool((whole[rows:] == 7).all())


@runs
@pytest.mark.parametrize("op", KERNELS)
def test_no_rows_and_strided_rows(op):
    given = [t.to(DEVICE) for t in inputs(op, 4, 64, 16, torch.float32)]
    with vfmtok_fast.enable(op, strict=True):
        want = call(op, given)
        wide = given[0].new_full((4, 128), float("nan"))
        wide[:, ::2] = given[0]
        assert all(map(torch.equal, call(op, [wide[:, ::2], *given[1:]]), want))
        empty = [given[0][:0], *given[1:]]
        if op == "linear_residual":
            empty[2] = empty[2][:0]
        assert all(one.shape[0] == 0 for one in call(op, empty))


@runs
@pytest.mark.parametrize("op", KERNELS)
def test_what_it_cannot_take(op):
    given = [t.to(DEVICE) for t in inputs(op, 2, 64, 16, torch.float32)]
    weight = 1 if op == "linear_residual" else 2

    def reason(tensors: list[Tensor]) -> str:
        with vfmtok_fast.enable(op, strict=True), pytest.raises(RuntimeError) as caught:
            call(op, tensors)
        return str(caught.value)

    assert "not torch.float64" in reason([t.double() for t in given])
    strided = list(given)
    strided[weight] = given[weight].T.contiguous().T
    assert "contiguous weights" in reason(strided)
    learning = list(given)
    learning[weight] = given[weight].clone().requires_grad_()
    assert "no backward pass" in reason(learning)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert "autocast" in reason(given)
    with torch.no_grad(), vfmtok_fast.enable(op, strict=True):
        call(op, learning)


@runs
@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("stored", [torch.float32, torch.int8])
def test_torch_knows_the_op(op, stored):
    given = [t.to(DEVICE) for t in inputs(op, 2, 64, 16, torch.float32)]
    given, scales = quantized(op, given) if stored == torch.int8 else (given, {})
    extra = {"linear_residual": (scales.get("scale"),), "norm_linear": (scales.get("scale"), 1e-5)}
    extra["gate_up"] = (scales.get("gate_scale"), scales.get("up_scale"), 1e-5)
    if op == "qkv_rotary":
        caches = [torch.zeros(2, H, T, D, device=DEVICE) for _ in range(2)]
        given.insert(3, scales.get("scale"))
        extra[op] = (*caches, torch.tensor([1], device=DEVICE), 0, 1e-5)
    target = getattr(torch.ops.vfmtok_fast, f"{op}_triton").default
    torch.library.opcheck(target, (*given, *extra[op]))


@runs
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_without_graph_breaks(op):
    given = [t.to(DEVICE) for t in inputs(op, 2, 64, 16, torch.float32)]
    caches = [torch.zeros(2, H, T, D, device=DEVICE) for _ in range(2)]
    extra = (*caches, torch.tensor([1], device=DEVICE)) if op == "qkv_rotary" else ()
    with torch.no_grad(), vfmtok_fast.enable(op, strict=True):
        want = getattr(ops, op)(*given, *extra)
        kept = [cache.clone() for cache in caches]
        compiled = torch.compile(getattr(ops, op), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(*given, *extra), want)
    assert all(map(torch.equal, caches, kept))


@pytest.mark.gpu
@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("overlap", [False, True])
def test_a_graph_replays_the_same_bits(op, overlap, monkeypatch):
    """Both settings, on calls that do not depend on each other.

    That a kernel waits for what it reads shows only in a chain of steps: test_generator_kernels.
    """
    if overlap and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs sm_90")
    given = [t.cuda() for t in inputs(op, 2, 1024, 1024, torch.bfloat16)]
    monkeypatch.setattr(launch, "OVERLAP", False)
    want = call(op, given) if op != "qkv_rotary" else None
    monkeypatch.setattr(launch, "OVERLAP", overlap)
    caches = [torch.zeros(2, H, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    extra = (*caches, torch.tensor([1], device="cuda")) if op == "qkv_rotary" else ()
    with torch.no_grad(), vfmtok_fast.enable(op, strict=True):
        eager = [getattr(ops, op)(*given, *extra) for _ in range(3)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain = [getattr(ops, op)(*given, *extra) for _ in range(8)]
        for _ in range(5):
            for out in chain:
                out.fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(out, eager) for out in chain)
    if want is not None:
        torch.testing.assert_close(eager, want[0], rtol=2e-2, atol=2e-2)
