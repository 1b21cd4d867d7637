"""The Triton sampling and its gradients against float64, in the interpreter or on a GPU."""

from __future__ import annotations

import functools
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.reference.deformable_sample import deformable_sample as reference

pytest.importorskip("triton")
from vfmtok_fast.kernels import deformable_sample as kernel

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
FORWARD, BACKWARD = ("_gather", "_dense"), ("_grad_samples", "_grad_value")
HERE = pytest.mark.skipif(not INTERPRETED, reason="runs in the child pytest")
runs = pytest.mark.gpu if GPU else HERE
pytestmark = pytest.mark.usefixtures("poison")
# The interpreter's bfloat16 products are wrong; a GPU's are not.
HALVES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
# Odd, not square, one pixel wide; a strip of three tiles and more; tiles in two rows.
ODD = ((5, 7), (3, 2), (1, 4), (1, 1))
WIDE = ((9, 27), (17, 8))


@pytest.mark.slow
@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests below run here")
def test_in_the_interpreter(run_in_interpreter):
    run_in_interpreter(__file__)


@pytest.fixture
def launched(record):
    return record(kernel, *FORWARD, *BACKWARD)


def make(levels=ODD, B=2, Q=21, H=2, P=4, D=16, seed=0, rows=None, dtype=torch.float32, spread=2.0):
    """Random arguments, in the order of the op."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    S, L = sum(h * w for h, w in levels), len(levels)
    points = torch.rand((rows or B, Q, L, 2), generator=generator, dtype=torch.float64)
    tensors = normal(B, S, H, D), points, spread * normal(B, Q, H, L, P, 2), normal(B, Q, H, L * P)
    value, *rest = (x.to(DEVICE, dtype) for x in tensors)
    return [value, levels, *rest]


def run(function, arguments, dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients of value, points, offsets and logits under a random cotangent."""
    leaves = [
        x.to(dtype).detach().requires_grad_() if isinstance(x, Tensor) else x for x in arguments
    ]
    out = function(*leaves)
    draw = torch.Generator().manual_seed(9)
    cotangent = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    # Of the narrow type whatever ``dtype``: all runs differentiate the same sum.
    cotangent = cotangent.to(DEVICE, arguments[0].dtype).to(dtype)
    inputs = [x for x in leaves if isinstance(x, Tensor)]
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def check(arguments) -> list[Tensor]:
    """Within twice the error of the reference in the same type, and one rounding."""
    dtype = arguments[0].dtype
    got, ruler = run(kernel.deformable_sample, arguments, dtype), run(reference, arguments, dtype)
    truth = run(reference, arguments, torch.float64)
    names = "output", "value", "points", "offsets", "logits"
    for name, exact, own, ours in zip(names, truth, ruler, got, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        rounding = torch.finfo(dtype).eps * float(exact.abs().max())
        error, allowed = (float((x - exact).abs().max()) for x in (ours, own))
        assert error <= 2 * allowed + rounding, f"{name}: {error:.2e}, reference {allowed:.2e}"
    return got


@pytest.fixture(params=["gather", "dense"])
def form(request, monkeypatch) -> str:
    """Both forms of the forward pass, at any size."""
    monkeypatch.setattr(kernel, "DENSE_PIXELS", {"gather": 0, "dense": 10**6}[request.param])
    return request.param


SHAPES = [
    {},
    {"B": 3, "rows": 1, "D": 24},
    {"levels": WIDE, "Q": 70, "H": 1, "D": 32},
    {"levels": ((4, 4),), "Q": 40, "P": 1, "D": 8, "spread": 8.0},  # Most fall outside.
    {"levels": ((6, 6),) * 3, "B": 1, "P": 5, "D": 60},
    {"levels": ((1, 40), (40, 1)), "Q": 33, "P": 2, "D": 64, "H": 3},
]
# Rows and points that the dense form leaves to the other.
LARGE = [
    {"levels": WIDE, "B": 1, "Q": 50, "P": 3, "D": 100},
    {"levels": ((6, 6),), "B": 1, "P": 9, "D": 128},
    {"levels": ((6, 6),), "P": 16, "D": 16},
]


@runs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(shape, dtype, form, launched):
    check(make(dtype=dtype, **shape))
    other = {"gather": "_dense", "dense": "_gather"}[form]
    assert {name: len(r.launches) for name, r in launched.items()} == {
        f"_{form}": 1, other: 0, "_grad_samples": 1, "_grad_value": 1,
    }  # fmt: skip


@runs
@pytest.mark.parametrize("shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_of_what_the_dense_form_has_no_room_for(shape, dtype, launched):
    check(make(dtype=dtype, **shape))
    assert len(launched["_gather"].launches) == 1 and not launched["_dense"].launches


@runs
@pytest.mark.parametrize("shape", SHAPES + LARGE, ids=str)
def test_float32(shape, launched):
    check(make(**shape))
    assert {name: len(r.launches) for name, r in launched.items()} == {
        "_gather": 1, "_dense": 0, "_grad_samples": 1, "_grad_value": 1,
    }  # fmt: skip


@runs
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_rounds_the_matrix_and_the_result_only(dtype, form):
    """Sharper than the reference, which rounds locations, where an error counts in pixels."""
    arguments = make(dtype=dtype, D=32)
    with torch.no_grad():
        error = kernel.deformable_sample(*arguments) - reference(
            *(x.double() if isinstance(x, Tensor) else x for x in arguments)
        )
    # Shares add up to at most 1.
    bound = torch.finfo(dtype).eps * float(arguments[0].abs().max())
    assert float(error.abs().max()) <= bound


@runs
@given(
    levels=st.lists(st.tuples(st.integers(1, 11), st.integers(1, 11)), min_size=1, max_size=3),
    B=st.integers(1, 2), Q=st.integers(1, 9), H=st.integers(1, 2), P=st.integers(1, 5),
    D=st.integers(1, 40), half=st.booleans(), spread=st.sampled_from([0.0, 1.0, 9.0]),
    dense=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_any_shape(levels, B, Q, H, P, D, half, spread, dense, seed):
    dtype = torch.float16 if half else torch.float32
    arguments = make(tuple(levels), B, Q, H, P, D, seed, dtype=dtype, spread=spread)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "DENSE_PIXELS", 10**6 if dense else 0)
        got = run(kernel.deformable_sample, arguments, dtype)
    truth = run(reference, arguments, torch.float64)
    value, points, offsets, _ = (x.double() for x in arguments if isinstance(x, Tensor))
    # Coordinates are float32 numbers below 2^5 and off by 2 roundings, which moves values,
    # differing by up to 2 * size, by as much; the results round once in their type, the matrix
    # once. Sums of gradients have up to Q * P terms.
    size, place = float(value.abs().max()), float(offsets.abs().max()) + 11
    moved = 4 * torch.finfo(torch.float32).eps * place * size
    slack = 2 * (moved + 4 * torch.finfo(dtype).eps * size)
    for exact, ours in zip((truth[0],), got[:1], strict=True):
        assert float((ours - exact).abs().max()) <= slack
    # A gradient may sit on the other side of a kink; the value's has none.
    cotangent = 4.0 * Q * P
    assert float((got[1] - truth[1]).abs().max()) <= slack / size * cotangent
    assert all(bool(x.isfinite().all()) for x in got)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_gradients_at_whole_numbers_are_the_floor_sides(dtype):
    """Powers of two, so that float64 too meets the pixel centres and borders exactly."""
    levels = ((8, 4), (4, 16))
    value, _, points, offsets, logits = make(levels, Q=24, P=2, dtype=dtype)
    points = (torch.arange(48 * 4, device=DEVICE).reshape(2, 24, 2, 2) % 17 / 16).to(dtype)
    offsets = offsets.round() + 0.5 * torch.eye(2, dtype=dtype, device=DEVICE)[0]
    got = check([value, levels, points, offsets, logits])
    # It is a real test only where the sides differ.
    nudged = check([value, levels, points, offsets - 2.0**-5, logits])
    assert float((got[3] - nudged[3]).abs().max()) > 0.1


@runs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_location_that_is_not_on_the_map_counts_nothing(bad, form):
    """NaN too: no other query is touched, and the gradients stay finite."""
    arguments = make(dtype=torch.float32 if bad == 3e38 else torch.float16)
    arguments[3][1, 2, 1, 0, 1, 0] = bad
    got = run(kernel.deformable_sample, arguments, arguments[0].dtype)
    assert all(bool(x.isfinite().all()) for x in got)
    arguments[3][1, 2, 1, 0, 1, 0] = -1000  # So far out that it counts nothing in the reference.
    for ours, far in zip(
        got, run(kernel.deformable_sample, arguments, arguments[0].dtype), strict=True
    ):
        assert torch.equal(ours, far)


@runs
def test_nothing_is_read_of_another_head_or_past_the_end(form):
    """Rows are loaded as wide as the next power of two; what lies there is NaN."""
    value, levels, *rest = make(B=1, Q=5, D=12, dtype=torch.float16)
    padded = value.new_full((value.numel() + 64,), float("nan"))
    spoilt = padded[: value.numel()].view_as(value).copy_(value)
    for clean in (0, 1):  # The first head, then the one that the padding follows.
        spoilt[:, :, clean], spoilt[:, :, 1 - clean] = value[:, :, clean], float("nan")
        want, got = (
            run(kernel.deformable_sample, [x, levels, *rest], torch.float16)
            for x in (value, spoilt)
        )
        for results in (want, got):
            results[0] = results[0].unflatten(-1, (2, 12))
            del results[2]  # The points' gradients are sums over heads, dimension 2 of all others.
        for ours, exact in zip(got, want, strict=True):
            assert torch.equal(ours[:, :, clean], exact[:, :, clean])


@runs
def test_extreme_logits(form):
    arguments = make(dtype=torch.float16)
    arguments[4].mul_(3000)
    check(arguments)


@runs
@pytest.mark.parametrize("empty", [{"B": 0, "rows": 1}, {"Q": 0}, {"H": 0}], ids=str)
def test_nothing_gives_nothing(empty):
    got = run(kernel.deformable_sample, make(**empty), torch.float32)
    assert got[0].numel() == 0 and not any(bool(x.any()) for x in got[1:])


@runs
def test_strided_arguments():
    arguments = make(H=4)
    want = run(kernel.deformable_sample, arguments, torch.float32)
    value, levels, *rest = arguments
    value = value.transpose(1, 2).contiguous().transpose(1, 2)
    rest = [torch.stack([x, x], dim=-1)[..., 0] for x in rest]
    assert not any(x.is_contiguous() for x in (value, *rest))
    for strided, ours in zip(
        run(kernel.deformable_sample, [value, levels, *rest], torch.float32), want, strict=True
    ):
        assert torch.equal(strided, ours)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_same_bits_on_every_run(dtype):
    arguments = make(WIDE, B=1, Q=40, H=1, dtype=dtype)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(kernel.deformable_sample, arguments, dtype)
        for _ in range(20):
            again = run(kernel.deformable_sample, arguments, dtype)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@runs
def test_only_what_is_needed_is_computed(launched):
    value, levels, points, offsets, logits = make()
    kernel.deformable_sample(
        value, levels, points, offsets, logits.requires_grad_()
    ).sum().backward()
    assert len(launched["_grad_samples"].launches) == 1
    assert not launched["_grad_value"].launches
    with torch.no_grad():
        kernel.deformable_sample(value, levels, points, offsets, logits)
    assert len(launched["_grad_samples"].launches) == 1


@runs
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_what_is_allocated_is_results_and_a_tenth(dtype, monkeypatch):
    """A tenth of inputs and results; counted where it is made. test_memory has a GPU's peak."""
    made = []

    def counted(make, *args, **kwargs) -> Tensor:
        made.append(make(*args, **kwargs))
        return made[-1]

    for name in ("empty", "empty_like", "zeros", "zeros_like"):
        monkeypatch.setattr(torch, name, functools.partial(counted, getattr(torch, name)))
    arguments = make(((8, 8), (4, 4)), B=1, Q=16, D=32, dtype=dtype)
    leaves = [x.requires_grad_() for x in arguments if isinstance(x, Tensor)]
    made.clear()
    out = kernel.deformable_sample(leaves[0], arguments[1], *leaves[1:])
    grads = torch.autograd.grad(out.sum(), leaves)
    inputs, results, allocated = (
        sum(x.numel() * x.itemsize for x in tensors) for tensors in (leaves, (out, *grads), made)
    )
    assert results - grads[1].nbytes <= allocated <= 1.1 * (inputs + results) - inputs


@runs
def test_a_second_derivative_is_refused():
    """Not taken for zero."""
    value, levels, *rest = make(Q=5)
    out = kernel.deformable_sample(value.requires_grad_(), levels, *rest)
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="^deformable_sample: .* first derivatives only"):
        grad.square().sum().backward()


@runs
def test_small_maps_take_the_dense_form_and_large_ones_do_not(launched, monkeypatch):
    monkeypatch.setattr(kernel, "DENSE_PIXELS", 4)  # With any Triton.
    for side, form in ((16, "_dense"), (17, "_gather")):
        kernel.deformable_sample(*make(((side, side), (3, 3)), Q=3, D=64, dtype=torch.float16))
        assert [name for name, r in launched.items() if r.launches] == [form]
        launched[form].launches.clear()


@runs
def test_the_switch_takes_it_and_says_why_not():
    arguments = make(D=64)
    one, _, *rest = make(((1, 1),), B=1, Q=1, H=8, D=64)
    huge = [one.expand(1, 2048 * 2048, 8, 64), ((2048, 2048),), *rest]
    with vfmtok_fast.enable("deformable_sample", strict=True):
        got = ops.deformable_sample(*arguments)
        assert torch.equal(got, kernel.deformable_sample(*arguments))
        assert vfmtok_fast.status().ops["deformable_sample"].calls["triton"] == 1
        for wrong, reason in (
            (make(dtype=torch.float64), "not torch.float64"),
            (make(D=129), "not 129"),
            (make(((1, 1),), B=1, Q=1, P=257), "not 257"),
            (make(((1, 40000),), B=1, Q=1), "32767 pixels along a side"),
            (huge, "less than 2\\^31 values per image"),
        ):
            with pytest.raises(RuntimeError, match=reason):
                ops.deformable_sample(*wrong)


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_types_alone(dtype):
    """As for any op that autocast does not know; the layers around it set the type."""
    arguments = make()
    with torch.autocast(DEVICE, dtype):
        got = kernel.deformable_sample(*arguments)
    assert torch.equal(got, kernel.deformable_sample(*arguments))


@runs
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad):
    value, levels, *rest = make(Q=5)
    sides = [side for level in levels for side in level]
    value, *rest = (x.requires_grad_(needs_grad) for x in (value, *rest))
    registered = torch.ops.vfmtok_fast
    torch.library.opcheck(registered.deformable_sample_triton, (value, sides, *rest))
    value, *rest = (x.detach() for x in (value, *rest))
    grad = registered.deformable_sample_triton(value, sides, *rest)
    torch.library.opcheck(registered.deformable_sample_triton_samples, (grad, value, sides, *rest))
    log_sum = registered.deformable_sample_triton_samples(grad, value, sides, *rest)[2]
    torch.library.opcheck(
        registered.deformable_sample_triton_value, (grad, sides, *rest, log_sum, value.shape[3])
    )


@runs
def test_torch_compile_takes_it_without_a_graph_break():
    arguments = make(Q=5)
    compiled = torch.compile(lambda *x: ops.deformable_sample(*x) * 2, fullgraph=True)
    with vfmtok_fast.enable("deformable_sample", strict=True):
        got = run(compiled, arguments, torch.float32)
        want = run(lambda *x: ops.deformable_sample(*x) * 2, arguments, torch.float32)
        assert "triton (compiled)" in vfmtok_fast.status().ops["deformable_sample"].calls
    for ours, eager in zip(got, want, strict=True):
        torch.testing.assert_close(ours, eager)


def encoder_shape(B: int, dtype: torch.dtype):
    return make(((24, 24),) * 4, B=B, Q=256, H=8, P=4, D=64, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_region_encoder_shape(dtype):
    check(encoder_shape(2, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype):
    """Inputs, outputs and gradients, and a tenth."""
    arguments = encoder_shape(16, dtype)
    run(kernel.deformable_sample, arguments, dtype)
    leaves = [x.requires_grad_() for x in arguments if isinstance(x, Tensor)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = kernel.deformable_sample(leaves[0], arguments[1], *leaves[1:])
    cotangent = torch.ones_like(out)
    grads = torch.autograd.grad(out, leaves, cotangent)
    sizes = [x.numel() * x.itemsize for x in (*leaves, out, cotangent, *grads)]
    inputs = sum(sizes[: len(leaves)])
    assert torch.cuda.max_memory_allocated() - before + inputs <= 1.1 * sum(sizes)


@pytest.mark.gpu
def test_cuda_graph_and_stream():
    arguments = encoder_shape(2, torch.bfloat16)
    leaves = [x.requires_grad_() for x in arguments if isinstance(x, Tensor)]

    def step() -> tuple[Tensor, ...]:
        out = kernel.deformable_sample(leaves[0], arguments[1], *leaves[1:])
        # Detached: a graph kept from another stream would bring that stream into the capture.
        return out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaves[0].mul_(-2)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    arguments = encoder_shape(1, torch.float16)
    here = kernel.deformable_sample(*arguments)
    there = kernel.deformable_sample(
        *(x.to("cuda:1") if isinstance(x, Tensor) else x for x in arguments)
    )
    assert torch.equal(here.cpu(), there.cpu())
