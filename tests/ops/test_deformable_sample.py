"""deformable_sample against a slow float64 oracle: one sample, one pixel at a time.

Every test runs on the reference and on the CPU implementation; the Triton kernels have their own
file.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import switch
from vfmtok_fast.ops import deformable_sample

# Odd, not square, one pixel wide: confusing height and width cannot pass.
LEVELS = ((5, 7), (3, 2), (1, 4), (1, 1))


@pytest.fixture(autouse=True)
def chosen(taking, clean_switch):
    yield from taking("deformable_sample")


def make(
    levels=LEVELS, B=2, Q=5, H=2, P=3, D=6, seed=0, rows=None, dtype=torch.float64, spread=2.0
):
    """Return random arguments, in the op's order."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    S, L = sum(h * w for h, w in levels), len(levels)
    points = torch.rand((rows or B, Q, L, 2), generator=generator, dtype=torch.float64).to(dtype)
    offsets = spread * normal(B, Q, H, L, P, 2)
    return [normal(B, S, H, D), levels, points, offsets, normal(B, Q, H, L * P)]


def pixel(value: Tensor, start: int, height: int, width: int, row: int, column: int) -> Tensor:
    """Return value [S, D] at a pixel of the level that begins at ``start``, zero outside."""
    if 0 <= row < height and 0 <= column < width:
        return value[start + row * width + column]
    return torch.zeros_like(value[0])


def oracle(value, levels, points, offsets, logits) -> Tensor:
    value, points, offsets, logits = (x.double() for x in (value, points, offsets, logits))
    B, Q, H, L, P, _ = offsets.shape
    out = torch.zeros(B, Q, H, value.shape[-1], dtype=torch.float64)
    for b in range(B):
        for q in range(Q):
            for h in range(H):
                weights = logits[b, q, h].softmax(dim=0)
                start = 0
                for level, (height, width) in enumerate(levels):
                    centre = points[b if len(points) > 1 else 0, q, level]
                    for p in range(P):
                        offset = offsets[b, q, h, level, p]
                        # In pixels; pixel centres are integers.
                        x = float((centre[0] + offset[0] / width) * width - 0.5)
                        y = float((centre[1] + offset[1] / height) * height - 0.5)
                        left, top = math.floor(x), math.floor(y)
                        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
                            share = (y - top if row else top + 1 - y) * (
                                x - left if column else left + 1 - x
                            )
                            out[b, q, h] += (
                                weights[level * P + p]
                                * share
                                * pixel(
                                    value[b, :, h], start, height, width, top + row, left + column
                                )
                            )
                    start += height * width
    return out.flatten(2)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"B": 1, "Q": 1, "H": 1, "P": 1, "D": 1},
        {"Q": 7, "H": 3, "D": 24},
        {"B": 3, "rows": 1},
        {"levels": ((4, 4),), "P": 4, "spread": 8.0},  # Most samples fall outside.
        {"levels": ((1, 9), (9, 1)), "P": 2, "D": 5},
    ],
    ids=str,
)
def test_matches_the_oracle(shape):
    arguments = make(**shape)
    got = deformable_sample(*arguments)
    # About 50 float64 roundings of numbers below 10, with locations of up to 10 pixels.
    torch.testing.assert_close(got, oracle(*arguments), rtol=0, atol=1e-13)


@settings(max_examples=25, deadline=None)
@given(
    levels=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3),
    B=st.integers(1, 2), Q=st.integers(1, 3), H=st.integers(1, 2), P=st.integers(1, 2),
    D=st.integers(1, 5), spread=st.sampled_from([0.0, 1.0, 5.0]), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_matches_the_oracle_for_any_shape(levels, B, Q, H, P, D, spread, seed):
    arguments = make(tuple(levels), B, Q, H, P, D, seed, spread=spread)
    torch.testing.assert_close(
        deformable_sample(*arguments), oracle(*arguments), rtol=0, atol=1e-13
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_types_round_only(dtype):
    """Half precision and float32 are within a derived rounding bound of the float64 oracle.

    Each of L*P samples may be off by the errors of a location, a weight and a few sums. A location
    is a number up to 2 (in [-1, 1] of `grid_sample`), rounded 4 times. One level unit of it is W /
    2 pixels between values that differ by up to `step`. Then follow about 4 + L roundings of
    numbers up to `size`.
    """
    arguments = make(P=2, dtype=dtype, spread=1.0)
    got = deformable_sample(*arguments)
    assert got.dtype == dtype
    eps, size = torch.finfo(dtype).eps, float(arguments[0].abs().max())
    step, width, L = 2 * size, 7, len(LEVELS)
    bound = eps * (4 * 2 * (width / 2) * 2 * step + (4 + L) * 2 * size)
    assert (got.double() - oracle(*arguments)).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_image_of_full_size_in_half_precision(dtype):
    """For the strides of such an input, torch's own `grid_sample` reads the wrong memory."""
    arguments = make(((24, 24),), B=1, Q=16, H=8, P=4, D=64, dtype=dtype, spread=1.0)
    wide = [x.double() if isinstance(x, Tensor) else x for x in arguments]
    error = (deformable_sample(*arguments) - deformable_sample(*wide)).abs().max()
    # Locations are 4 roundings of a number up to 2, times 12 pixels; values differ by up to 8.
    assert error <= torch.finfo(dtype).eps * (4 * 2 * 12 * 2 * 8 + 8)


def at(x: float, y: float, image: Tensor) -> float:
    """Sample a one-level, one-head, one-channel image [h, w] once at (x, y) in [0, 1]."""
    height, width = image.shape
    return float(
        deformable_sample(
            image.double().reshape(1, -1, 1, 1),
            ((height, width),),
            torch.tensor([[[[x, y]]]], dtype=torch.float64),
            torch.zeros(1, 1, 1, 1, 1, 2, dtype=torch.float64),
            torch.zeros(1, 1, 1, 1, dtype=torch.float64),
        )
    )


def test_pixel_centres_edges_and_outside():
    image = torch.arange(1.0, 13.0).reshape(3, 4)
    for row in range(3):
        for column in range(4):
            assert at((column + 0.5) / 4, (row + 0.5) / 3, image) == pytest.approx(
                float(image[row, column]), abs=1e-12
            )
    assert at(0.25, 0.5, image) == pytest.approx(5.5)  # Between two pixels of the middle row.
    assert at(0.0, 0.5, image) == pytest.approx(5 / 2)  # On the border half the weight is outside.
    assert at(0.0, 0.0, image) == pytest.approx(1 / 4)
    assert at(1.0, 1.0, image) == pytest.approx(12 / 4)
    assert at(-0.5 / 4, 0.5, image) == pytest.approx(0)
    assert at(5.0, 0.5, image) == at(0.5, -3.0, image) == at(1e9, -1e9, image) == 0


def test_weights_are_a_softmax_over_all_levels_and_points():
    value, levels, points, offsets, logits = make(((4, 5), (4, 4), (3, 3), (3, 4)))
    inside = (torch.full_like(points, 0.5), torch.zeros_like(offsets))
    got = deformable_sample(torch.ones_like(value), levels, *inside, logits + 100)
    torch.testing.assert_close(got, torch.ones_like(got), rtol=0, atol=1e-13)
    logits[..., 1 * 3 + 2] = 1e4  # Level 1, point 2 alone: values of level 1 are 1, others are 0.
    only = torch.zeros_like(value)
    only[:, 20:36] = 1
    got = deformable_sample(only, levels, *inside, logits)
    assert torch.equal(got, torch.ones_like(got))


def test_deterministic_is_a_bool():
    arguments = make()
    want = deformable_sample(*arguments)
    assert torch.equal(deformable_sample(*arguments, deterministic=False), want)
    with pytest.raises(TypeError, match="^deformable_sample: deterministic must be True or False"):
        deformable_sample(*arguments, deterministic=1)


def test_levels_may_come_as_a_tensor():
    arguments = make()
    want = deformable_sample(*arguments)
    arguments[1] = torch.tensor(arguments[1])
    assert torch.equal(deformable_sample(*arguments), want)


@pytest.mark.parametrize("none", [{"P": 0}, {"levels": ()}], ids=str)
def test_there_must_be_something_to_sample(none):
    with pytest.raises(ValueError, match="^deformable_sample: there must be at least one level"):
        deformable_sample(*make(**none))


def test_one_row_of_reference_points_serves_the_batch():
    value, levels, points, offsets, logits = make(B=3, rows=1)
    shared = deformable_sample(value, levels, points, offsets, logits)
    own = deformable_sample(value, levels, points.expand(3, -1, -1, -1), offsets, logits)
    assert torch.equal(shared, own)


def test_a_bad_location_spoils_its_own_query_and_head_only():
    arguments = make()
    want = deformable_sample(*arguments).unflatten(-1, (2, 6))
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoilt = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        spoilt[3][1, 2, 1, 0, 1, 0] = bad
        got = deformable_sample(*spoilt).unflatten(-1, (2, 6))
        keep = torch.ones(2, 5, 2, dtype=torch.bool)
        keep[1, 2, 1] = False
        assert torch.equal(got[keep], want[keep])


@pytest.mark.parametrize("rows", [1, 2])
def test_gradients(rows):
    """All four gradients match finite differences, away from the kinks at pixel centres."""
    value, levels, points, offsets, logits = make(
        ((3, 2), (1, 2)), Q=2, H=1, P=2, D=2, rows=rows, seed=3
    )
    size = torch.tensor([(w, h) for h, w in levels], dtype=torch.float64)
    place = (points[:, :, None, :, None] + offsets / size[:, None]) * size[:, None] - 0.5
    assert (place - place.round()).abs().min() > 1e-4
    inputs = [x.requires_grad_() for x in (value, points, offsets, logits)]
    assert torch.autograd.gradcheck(
        lambda v, p, o, a: deformable_sample(v, levels, p, o, a), inputs, eps=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("empty", [{"B": 0}, {"Q": 0}, {"B": 0, "rows": 1}], ids=str)
def test_nothing_gives_nothing(empty):
    arguments = make(**empty)
    inputs = [x.requires_grad_() for x in arguments if isinstance(x, Tensor)]
    got = deformable_sample(*arguments)
    assert got.shape == (empty.get("B", 2), empty.get("Q", 5), 12)
    got.sum().backward()
    assert all(x.grad is None or not x.grad.any() for x in inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_of_narrow_types(dtype):
    """Gradients are within twice the reference's own error against float64, plus one rounding."""
    arguments = make(levels=((8, 4), (4, 16)), P=2, dtype=dtype)
    weight = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(9)).to(dtype)

    def gradients(kind: torch.dtype) -> list[Tensor]:
        leaves = [
            x.to(kind).detach().requires_grad_() if isinstance(x, Tensor) else x for x in arguments
        ]
        (deformable_sample(*leaves) * weight.to(kind)).sum().backward()
        return [x.grad for x in leaves if isinstance(x, Tensor)]

    with vfmtok_fast.enable(()):
        truth, ruler = gradients(torch.float64), gradients(dtype)
    switch.record.clear()
    for exact, own, got in zip(truth, ruler, gradients(dtype), strict=True):
        assert got.dtype == dtype
        eps = torch.finfo(dtype).eps * float(exact.abs().max())
        assert (got - exact).abs().max() <= 2 * (own - exact).abs().max() + eps


def test_works_under_torch_compile():
    arguments = make(LEVELS[:2], P=1, dtype=torch.float32)
    want = deformable_sample(*arguments)
    compiled = torch.compile(deformable_sample, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_have_the_same_bits_every_time(deterministic):
    arguments = make(levels=((9, 7),), Q=60, D=16, dtype=torch.float32)

    def gradients() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in arguments if isinstance(x, Tensor)]
        out = deformable_sample(leaves[0], arguments[1], *leaves[1:])
        return torch.autograd.grad(out.square().sum(), leaves)

    torch.use_deterministic_algorithms(deterministic)
    try:
        first = gradients()
        for _ in range(20 if deterministic else 3):
            assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def change(position: int, new) -> list:
    arguments = make(dtype=torch.float32)
    arguments[position] = new(arguments[position])
    return arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (change(0, lambda x: x[0]), ValueError, r"value must have shape \[B, S, H, D\], got"),
        (
            change(0, lambda x: x[:1]),
            ValueError,
            r"offsets must have shape \(1, 5, 2, 4, 3, 2\), got",
        ),
        (change(0, lambda x: x[..., :0]), ValueError, "there must be at least one level, .* D=0"),
        (change(3, lambda x: x[:, :, :, :, :0]), ValueError, "attention_logits must have shape"),
        (change(1, lambda x: ((5.5, 7), *x[1:])), TypeError, r"spatial_shapes must be \(height, w"),
        (change(1, lambda x: 5), TypeError, "spatial_shapes must be .* of integers, got 5"),
        (change(0, lambda x: x[:, :-1]), ValueError, "spatial_shapes must be 4 .* with 45 pixels"),
        (change(0, lambda x: x.long()), TypeError, "value must be floating point, got torch.int64"),
        (
            change(0, lambda x: x.half()),
            TypeError,
            "offsets must be torch.float16, as value is, got",
        ),
        (change(1, lambda x: x[:3]), ValueError, "spatial_shapes must be 4"),
        (
            change(1, lambda x: ((5, 7), (3, 2), (0, 4), (5, 1))),
            ValueError,
            "spatial_shapes must be 4",
        ),
        (change(1, lambda x: ((-5, -7), *x[1:])), ValueError, "spatial_shapes must be 4"),
        (
            change(2, lambda x: x.repeat(2, 1, 1, 1)),
            ValueError,
            "reference_points must have 1 or 2 rows",
        ),
        (
            change(2, lambda x: x[:, :4]),
            ValueError,
            r"reference_points must have shape \(2, 5, 4, 2\)",
        ),
        (
            change(2, lambda x: x[:, :, :1]),
            ValueError,
            r"reference_points must have shape \(2, 5, 4",
        ),
        (
            change(2, lambda x: x.to("meta")),
            ValueError,
            "reference_points must be on cpu, as value is",
        ),
        (
            change(3, lambda x: x[..., :1]),
            ValueError,
            r"offsets must have shape \(2, 5, 2, 4, 3, 2\)",
        ),
        (
            change(3, lambda x: x[:, :, :1]),
            ValueError,
            r"offsets must have shape \(2, 5, 2, 4, 3, 2\)",
        ),
        (
            change(4, lambda x: x[..., :-1]),
            ValueError,
            r"attention_logits must have shape \(2, 5, 2, 12",
        ),
        (
            change(4, lambda x: x.tolist()),
            TypeError,
            "attention_logits must be a torch.Tensor, got list",
        ),
    ],
)
def test_refuses_in_one_line(arguments, error, message):
    with pytest.raises(error, match=f"^deformable_sample: {message}") as caught:
        deformable_sample(*arguments)
    assert "\n" not in str(caught.value)
