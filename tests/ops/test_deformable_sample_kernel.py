"""Triton's deformable_sample against float64, on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import contextlib
import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from where_kernels_run import BACKEND, DEVICE, GPU, HALVES, in_the_interpreter, runs

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.reference.deformable_sample import deformable_sample as reference

pytest.importorskip("triton")
from vfmtok_fast.kernels import deformable_sample as kernel

KERNELS = ("_gather", "_grad_samples", "_sort", "_grad_value", "_add_value")
pytestmark = pytest.mark.usefixtures("poison")
# Odd, not square, one pixel wide; a strip of more than three tiles; tiles in two rows.
ODD = ((5, 7), (3, 2), (1, 4), (1, 1))
WIDE = ((9, 27), (17, 8))


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.fixture
def launched(record):
    return record(kernel, *KERNELS)


def make(levels=ODD, B=2, Q=21, H=2, P=4, D=16, seed=0, rows=None, dtype=torch.float32, spread=2.0):
    """Return random arguments, in the op's order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    S, L = sum(h * w for h, w in levels), len(levels)
    points = torch.rand((rows or B, Q, L, 2), generator=generator, dtype=torch.float64)
    tensors = normal(B, S, H, D), points, spread * normal(B, Q, H, L, P, 2), normal(B, Q, H, L * P)
    value, *rest = (x.to(DEVICE, dtype) for x in tensors)
    return [value, levels, *rest]


def run(function, arguments, dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the four gradients under a random output gradient.

    The gradients are those of value, points, offsets and logits.
    """
    leaves = [
        x.to(dtype).detach().requires_grad_() if isinstance(x, Tensor) else x for x in arguments
    ]
    out = function(*leaves)
    draw = torch.Generator().manual_seed(9)
    cotangent = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    # Rounded to the arguments' dtype, whatever ``dtype`` is: all runs differentiate the same sum.
    cotangent = cotangent.to(DEVICE, arguments[0].dtype).to(dtype)
    inputs = [x for x in leaves if isinstance(x, Tensor)]
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


def float32_bounds(arguments, exact_places: bool) -> list[Tensor]:
    """Return error bounds of float32 for every element of all five results; derived, not tuned.

    Every result is a sum of products. So its error is at most the sum with the largest absolute
    value of each factor, minus the sum with the exact ones. The error of a factor:

    - a share of a pixel: that of its place, one rounding of each number that the place is computed
      from;
    - a slope: 2 where the place may lie on the other side of a pixel's centre;
    - a share of attention: a few roundings of what is in its exponential;
    - a sum of K products: 2 K roundings of the sum of absolute values (a matrix unit may truncate
      where others round), plus eight of each product, as for float32 in three TF32 parts.

    Args:
        exact_places: places are sums of a few powers of two, which no rounding moves.
    """
    unit = 2.0**-24
    value, levels, points, offsets, logits = (
        x.double() if isinstance(x, Tensor) else x for x in arguments
    )
    B, Q, H, L, P, _ = offsets.shape
    draw = torch.Generator().manual_seed(9)
    grad = torch.randn(B, Q, H * value.shape[3], generator=draw, dtype=torch.float64)
    grad = grad.to(DEVICE, arguments[0].dtype).double().view(B, Q, H, -1).abs()

    lse = logits.logsumexp(-1, keepdim=True)
    own = (2 * L * P + 4 * (logits - lse).abs() + 4 * lse.abs() + 16) * unit
    attention = (logits - lse).exp().view(B, Q, H, L, P)
    attention = torch.stack([attention, attention * (1 + own.view_as(attention))])

    def total(equation: str, *factors: Tensor, terms: int) -> Tensor:
        """The sum of the exact factors and of the largest ones, [2, ...]."""
        exact, most = (torch.einsum(equation, *(f[i] for f in factors)) for i in (0, 1))
        return torch.stack([exact, most * (1 + (2 * terms + 8) * unit)])

    def both(x: Tensor) -> Tensor:
        return torch.stack([x, x])

    by_value, output, by_place, sampled = [], 0.0, [], []
    for level, ((height, width), pixels) in enumerate(
        zip(levels, value.abs().split([h * w for h, w in levels], dim=1), strict=True)
    ):
        pixels, tents, slopes = both(pixels.unflatten(1, (height, width))), [], []
        for axis, size in enumerate((width, height)):
            centre = (points[:, :, level, axis] * size)[:, :, None, None]
            offset = offsets[:, :, :, level, :, axis] - 0.5
            place = (centre + offset)[..., None]
            off = unit * (1 + (centre.abs() + offset.abs())[..., None] + place.abs())
            away = (place - torch.arange(size, device=DEVICE)).abs()
            tent = (1 - away).clamp(min=0)
            tents.append(torch.stack([tent, tent + off * (away < 1 + off)]))
            kink = (away <= off) | ((away - 1).abs() <= off)
            slope = ((away < 1) & ~kink).double()
            slopes.append(torch.stack([slope, slope + 2 * kink]))
            if exact_places:
                slopes[-1] = both((away <= 1).double())
        share, g, (x, y) = attention[..., level, :], both(grad), tents
        seen = total("bqhd,brchd->bqhrc", g, pixels, terms=value.shape[3])
        by_value.append(
            total("bqhp,bqhpr,bqhpc,bqhd->brchd", share, y, x, g, terms=Q * P).flatten(2, 3)
        )
        output += total("bqhp,bqhpr,bqhpc,brchd->bqhd", share, y, x, pixels, terms=4 * L * P)
        sampled.append(total("bqhpr,bqhpc,bqhrc->bqhp", y, x, seen, terms=4))
        by_place.append(torch.stack([
            total("bqhp,bqhpr,bqhpc,bqhrc->bqhp", share, y, slopes[0], seen, terms=4),
            total("bqhp,bqhpr,bqhpc,bqhrc->bqhp", share, slopes[1], x, seen, terms=4),
        ], dim=-1))  # fmt: skip
    by_offsets = torch.stack(by_place, dim=4)
    sides = points.new_tensor(levels).flip(1)
    by_points = by_offsets.sum(dim=(3, 5)) * sides
    by_points[1] *= 1 + (2 * H * P + 4) * unit
    sampled = torch.stack(sampled, dim=4)
    mean = total("bqhlp,bqhlp->bqh", attention, sampled, terms=L * P)[..., None, None]
    by_logits = (
        attention
        * (sampled + mean)
        * torch.tensor([1, 1 + 4 * unit], device=DEVICE).view(2, 1, 1, 1, 1, 1)
    )
    results = [
        output.flatten(3),
        torch.cat(by_value, 2),
        by_points,
        by_offsets,
        by_logits.flatten(4),
    ]
    bounds = [most - exact for exact, most in results]
    bounds[2] = bounds[2].sum_to_size(points.shape)
    return bounds


def check(arguments, deterministic: bool = True, exact_places: bool = False) -> list[Tensor]:
    """Check float32 against its bound, half precision against twice the ruler plus a rounding."""
    dtype = arguments[0].dtype
    got = run(
        functools.partial(kernel.deformable_sample, deterministic=deterministic), arguments, dtype
    )
    truth = run(reference, arguments, torch.float64)
    names = "output", "value", "points", "offsets", "logits"
    if dtype == torch.float32:
        allowed = float32_bounds(arguments, exact_places)
    else:
        allowed = [
            2 * (own - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
            for own, exact in zip(run(reference, arguments, dtype), truth, strict=True)
        ]
    for name, ours, exact, most in zip(names, got, truth, allowed, strict=True):
        assert ours.dtype == dtype and ours.shape == exact.shape
        if dtype == torch.float32:
            assert most.shape == exact.shape
        share = float(((ours - exact).abs() / most.clamp(min=1e-40)).max())
        assert share <= 1, f"{name}: off by {share:.2f} times what is allowed"
    return got


SHAPES = [
    {},
    {"B": 3, "rows": 1, "D": 24},
    {"levels": WIDE, "Q": 70, "H": 1, "D": 32},
    {"levels": ((4, 4),), "Q": 40, "P": 1, "D": 8, "spread": 8.0},  # Most fall outside.
    {"levels": ((6, 6),) * 3, "B": 1, "P": 5, "D": 60},
    {"levels": ((1, 40), (40, 1)), "Q": 33, "P": 2, "D": 64, "H": 3},
    # Rows that are not powers of two, points in several steps, one query.
    {"levels": WIDE, "B": 1, "Q": 50, "P": 3, "D": 100},
    {"levels": ((6, 6),), "B": 1, "P": 9, "D": 128},
    {"levels": ((6, 6),), "P": 16, "D": 16},
    # So many samples that no power-of-two number of queries fills the backward pass's limit.
    {"levels": ((3, 3),) * 4, "B": 1, "Q": 32, "H": 1, "P": 20, "D": 8},
    {"B": 1, "Q": 1, "H": 1, "P": 1, "D": 1},
]


# In the interpreter, half precision runs one shape of each kind only: rows of two tiles, channels
# and points that are not powers of two. The dtype changes the width of loads and how the values'
# gradient multiplies, which `test_every_setting` covers too.
IN_HALF = SHAPES if GPU else [SHAPES[2], SHAPES[4]]


@runs
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in SHAPES]
    + [(shape, dtype) for shape in IN_HALF for dtype in HALVES],
    ids=str,
)
def test_any_type(shape, dtype, launched):
    check(make(dtype=dtype, **shape))
    assert {name: len(r.launches) for name, r in launched.items()} == {
        "_gather": 1, "_grad_samples": 1, "_sort": 1, "_grad_value": 1, "_add_value": 0,
    }  # fmt: skip


def groups_of_settings() -> list:
    """Return (dtype, settings): one setting at a time on a GPU, else one per kernel at a time.

    In the interpreter, half precision runs only the settings of the values' gradient, because it
    changes no other kernel's arithmetic. The kernel that adds atomically replaces that one, so its
    settings are separate.
    """
    groups, of_a_type = [], (kernel.VALUE, kernel.VALUE_FLOAT32)
    others = [space for space in kernel.SPACES if space not in (*of_a_type, kernel.ADD)]
    for dtype in (torch.float32, *HALVES):
        value = of_a_type[dtype == torch.float32]
        spaces = others if GPU or dtype == torch.float32 else []
        every = [[(space, s) for s in space.candidates()] for space in (*spaces, value)]
        adds = [(kernel.ADD, s) for s in kernel.ADD.candidates()] if spaces else []
        if GPU:
            together = [[one] for one in itertools.chain(*every)]
        else:
            together = [list(filter(None, group)) for group in itertools.zip_longest(*every)]
        groups += [(dtype, group) for group in (*together, *([one] for one in adds))]
    return groups


@runs
@pytest.mark.parametrize(("dtype", "group"), groups_of_settings())
def test_every_setting(dtype, group):
    """It has lists of two chunks, several groups, rows of two tiles and 5 points per level."""
    shape = {"levels": ((33, 9), (2, 5)), "B": 1, "Q": 130, "H": 1, "P": 5, "D": 8}
    with contextlib.ExitStack() as stack:
        for space, setting in group:
            stack.enter_context(space.using(setting))
        check(make(dtype=dtype, **shape), deterministic=group[0][0] is not kernel.ADD)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_additions_in_no_order_where_they_are_asked_for(dtype, launched):
    arguments = make(WIDE, Q=70, H=1, dtype=dtype)
    check(arguments, deterministic=False)
    assert len(launched["_add_value"].launches) == 1 and not launched["_grad_value"].launches
    # The reference cannot run in this mode on a GPU.
    torch.use_deterministic_algorithms(True)
    try:
        in_order = functools.partial(kernel.deformable_sample, deterministic=False)
        got = run(in_order, arguments, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(launched["_add_value"].launches) == 1 == len(launched["_grad_value"].launches)
    want = run(kernel.deformable_sample, arguments, dtype)
    assert all(torch.equal(ours, other) for ours, other in zip(got, want, strict=True))


@runs
def test_lists_hold_every_sample_that_touches_a_strip_once(launched):
    """Lists hold their samples in order of number, for any chunk size."""
    arguments = make(((9, 3), (4, 4)), B=1, Q=50, H=2, P=5, spread=4.0)
    for chunk in (16, 64, 256):
        setting = kernel.SORT.default(torch.device("cpu"))._replace(chunk=chunk, group=4)
        with kernel.SORT.using(setting):
            run(kernel.deformable_sample, arguments, torch.float32)
        lines, order, starts, words, N, *_ = launched["_sort"].launches[-1]
        height = launched["_sort"].constants[-1]["HEIGHT"]
        ends = 0
        for level, (rows, _) in enumerate(arguments[1]):
            bins = rows // height * 2 + min(rows % height, 1) + 1
            for h in range(2):
                line = lines[0, h, level].long()
                of_list = torch.where(
                    line < 0, -1, line // height * 2 + (line % height).clamp(max=1)
                )
                wanted = [(of_list == i).nonzero()[:, 0] for i in range(bins)]
                begins = starts[0, h, ends : ends + bins + 1].tolist()
                assert begins == [0, *torch.tensor([len(x) for x in wanted]).cumsum(0).tolist()]
                assert torch.equal(order[0, h, level, : begins[-1]].long(), torch.cat(wanted))
            ends += bins + 1
    assert int((lines < 0).sum()) > 10


@runs
@pytest.mark.parametrize("D", [32, 24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_the_matrix_and_the_result_only(dtype, D):
    """The kernel is more precise than the reference, which rounds locations, in pixels.

    The forward pass uses no matrix unit, so the interpreter is right for bfloat16 too. Values of
    that dtype are loaded two at a time.
    """
    arguments = make(dtype=dtype, D=D)
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
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
@settings(max_examples=15 if GPU else 8, deadline=None)
def test_any_shape(levels, B, Q, H, P, D, half, spread, seed):
    dtype = torch.float16 if half else torch.float32
    arguments = make(tuple(levels), B, Q, H, P, D, seed, dtype=dtype, spread=spread)
    got = run(kernel.deformable_sample, arguments, dtype)
    truth = run(reference, arguments, torch.float64)
    value, points, offsets, _ = (x.double() for x in arguments if isinstance(x, Tensor))
    # Coordinates are float32 numbers below 2^5 with an error of 2 roundings, which moves values
    # that differ by up to 2 * size by as much. Results are rounded once in their dtype, and the
    # matrix once. Sums of gradients have up to Q * P terms.
    size, place = float(value.abs().max()), float(offsets.abs().max()) + 11
    moved = 4 * torch.finfo(torch.float32).eps * place * size
    slack = 2 * (moved + 4 * torch.finfo(dtype).eps * size)
    for exact, ours in zip((truth[0],), got[:1], strict=True):
        assert float((ours - exact).abs().max()) <= slack
    # A gradient may be on the other side of a kink; the value's gradient has no kinks.
    cotangent = 4.0 * Q * P
    assert float((got[1] - truth[1]).abs().max()) <= slack / size * cotangent
    assert all(bool(x.isfinite().all()) for x in got)


@runs
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_gradients_at_whole_numbers_are_the_floor_sides(dtype):
    """Float64 too hits centres and borders exactly: places are sums of powers of two."""
    levels = ((8, 4), (4, 16))
    value, _, points, offsets, logits = make(levels, Q=24, P=2, dtype=dtype)
    points = (torch.arange(48 * 4, device=DEVICE).reshape(2, 24, 2, 2) % 17 / 16).to(dtype)
    offsets = offsets.round() + 0.5 * torch.eye(2, dtype=dtype, device=DEVICE)[0]
    got = check([value, levels, points, offsets, logits], exact_places=True)
    # The test proves something only where the two sides differ.
    nudged = check([value, levels, points, offsets - 2.0**-5, logits], exact_places=True)
    assert float((got[3] - nudged[3]).abs().max()) > 0.1


@runs
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_a_location_that_is_not_on_the_map_counts_nothing(bad):
    """This holds for NaN too: no other query changes, and the gradients stay finite."""
    arguments = make(dtype=torch.float32 if bad == 3e38 else torch.float16)
    arguments[3][1, 2, 1, 0, 1, 0] = bad
    got = run(kernel.deformable_sample, arguments, arguments[0].dtype)
    assert all(bool(x.isfinite().all()) for x in got)
    arguments[3][1, 2, 1, 0, 1, 0] = -1000  # Too far out to count in the reference.
    for ours, far in zip(
        got, run(kernel.deformable_sample, arguments, arguments[0].dtype), strict=True
    ):
        assert torch.equal(ours, far)


@runs
def test_nothing_is_read_of_another_head_or_past_the_end():
    """Rows are loaded as wide as the next power of two, and the extra elements hold NaN here."""
    value, levels, *rest = make(B=1, Q=5, D=12, dtype=torch.float16)
    padded = value.new_full((value.numel() + 64,), float("nan"))
    spoilt = padded[: value.numel()].view_as(value).copy_(value)
    for clean in (0, 1):  # The first head, then the one before the padding.
        spoilt[:, :, clean], spoilt[:, :, 1 - clean] = value[:, :, clean], float("nan")
        want, got = (
            run(kernel.deformable_sample, [x, levels, *rest], torch.float16)
            for x in (value, spoilt)
        )
        for results in (want, got):
            results[0] = results[0].unflatten(-1, (2, 12))
            del results[2]  # Sums over heads, which are dimension 2 elsewhere.
        for ours, exact in zip(got, want, strict=True):
            assert torch.equal(ours[:, :, clean], exact[:, :, clean])


@runs
def test_extreme_logits():
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
        for _ in range(20 if GPU else 2):
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
    assert not launched["_sort"].launches and not launched["_grad_value"].launches
    with torch.no_grad():
        kernel.deformable_sample(value, levels, points, offsets, logits)
    assert len(launched["_grad_samples"].launches) == 1


@runs
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_what_is_allocated_is_results_and_a_tenth(dtype, monkeypatch):
    """Beyond inputs and results at most a tenth of their bytes is allocated.

    Allocations are counted where they are made; test_memory checks the peak on a GPU.
    """
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
    """A second derivative raises an error instead of counting as zero."""
    value, levels, *rest = make(Q=5)
    out = kernel.deformable_sample(value.requires_grad_(), levels, *rest)
    (grad,) = torch.autograd.grad(out.square().sum(), value, create_graph=True)
    with pytest.raises(NotImplementedError, match="^deformable_sample: .* first derivatives only"):
        grad.square().sum().backward()


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


def test_a_measurement_counts_for_calls_of_its_kind():
    arguments = make(((5, 7), (3, 2)), B=3, Q=6, H=2, P=4, D=16, dtype=torch.bfloat16)
    want = ("bfloat16 D=16 samples=8 pixels=64", 36)
    assert kernel.tuning_key(*arguments) == want
    assert kernel.tuning_key(*arguments, deterministic=False) == want


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_types_alone(dtype):
    """Autocast leaves ops that it does not know alone; the layers around the op set the dtype."""
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
    torch.library.opcheck(registered.deformable_sample_triton, (value, sides, *rest, True))
    value, *rest = (x.detach() for x in (value, *rest))
    grad = registered.deformable_sample_triton(value, sides, *rest, True)
    torch.library.opcheck(registered.deformable_sample_triton_samples, (grad, value, sides, *rest))
    kept = registered.deformable_sample_triton_samples(grad, value, sides, *rest)[2:]
    torch.library.opcheck(
        registered.deformable_sample_triton_value,
        (grad, sides, *rest, *kept, value.shape[3], True),
    )


@runs
def test_torch_compile_takes_it_without_a_graph_break():
    arguments = make(Q=5)
    compiled = torch.compile(
        lambda *x: ops.deformable_sample(*x) * 2, backend=BACKEND, fullgraph=True
    )
    with vfmtok_fast.enable("deformable_sample", strict=True):
        got = run(compiled, arguments, torch.float32)
        want = run(lambda *x: ops.deformable_sample(*x) * 2, arguments, torch.float32)
        assert "triton (compiled)" in vfmtok_fast.status().ops["deformable_sample"].calls
    for ours, eager in zip(got, want, strict=True):
        torch.testing.assert_close(ours, eager)


class Devices(TorchDispatchMode):
    """Records the device types of all tensors that operations take and return."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in pytree.tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor):
                self.seen.add(x.device.type)
        return out


def test_backward_makes_no_tensor_on_the_host():
    """A captured graph cannot copy from pageable memory."""
    with FakeTensorMode():
        leaves = [
            torch.empty(size, device="cuda")
            for size in ((2, 45, 2, 16), (1, 5, 3, 2), (2, 5, 2, 3, 4, 2), (2, 5, 2, 12))
        ]
        ctx = SimpleNamespace(
            saved_tensors=leaves,
            sides=[5, 7, 3, 2, 1, 4],
            deterministic=True,
            needs_input_grad=(True, False, True, True, True, False),
        )
        with Devices() as devices:
            grads = kernel._backward(ctx, torch.empty(2, 5, 32, device="cuda"))
        shapes = [x.shape for x in grads if x is not None]
        assert shapes == [x.shape for x in leaves] and devices.seen == {"cuda"}
        with Devices() as devices:
            leaves[0].new_tensor([5, 7])
        assert devices.seen == {"cpu", "cuda"}  # What the test must detect.


def encoder_shape(B: int, dtype: torch.dtype):
    return make(((24, 24),) * 4, B=B, Q=256, H=8, P=4, D=64, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_region_encoder_shape(dtype):
    check(encoder_shape(2, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype):
    """Peak memory is at most a tenth above inputs, outputs and gradients."""
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
        # Detached: an autograd graph from another stream would draw that stream into the capture.
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
