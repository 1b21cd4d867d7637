"""add_norm: reference and CPU implementation against float64, gradients, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vfmtok_fast import ops
from vfmtok_fast.reference.add_norm import add_norm as reference


@pytest.fixture(autouse=True)
def fast(taking):
    yield from taking("add_norm")


def make(
    *shape: int, dtype=torch.float32, branch=None, weight=None, scaled: bool = True
) -> list[Tensor | None]:
    """Return x, branch, weight, bias, scale."""
    draw = torch.Generator().manual_seed(0)
    dtypes = (dtype, branch or dtype, weight or dtype, weight or dtype, weight or dtype)
    shapes = (shape, shape, *[shape[-1:]] * 3)
    parts = [torch.randn(s, generator=draw).to(d) for s, d in zip(shapes, dtypes, strict=True)]
    return parts if scaled else [*parts[:4], None]


def run(parts: list[Tensor | None], **options) -> tuple[Tensor, Tensor]:
    return ops.add_norm(*parts[:4], scale=parts[4], eps=1e-6, **options)


def wide(parts: list[Tensor | None]) -> list[Tensor | None]:
    return [None if part is None else part.double() for part in parts]


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, None, None),
        (torch.bfloat16, None, None),
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_formula(dtypes: tuple, scaled: bool, check_error):
    dtype, branch, weight = dtypes
    parts = make(5, 7, 33, dtype=dtype, branch=branch, weight=weight, scaled=scaled)
    normed_dtype = branch or dtype
    total, normed = run(parts, dtype=normed_dtype)
    x, b, w, bias, scale = wide(parts)
    truth = x + b * (1 if scale is None else scale)
    assert total.dtype == dtype and normed.dtype == normed_dtype
    # At most two roundings: of the product and of the sum.
    rounding = torch.finfo(dtype).eps * float(truth.abs().max())
    assert float((total - truth).abs().max()) <= rounding
    # The norm applies to the rounded sum.
    truth = F.layer_norm(total.double(), (33,), w, bias, 1e-6)
    ruler = F.layer_norm(total.float(), (33,), w.float(), bias.float(), 1e-6).to(normed_dtype)
    check_error(normed, truth, ruler)


def test_the_reference_equals_the_modules_bit_for_bit():
    x, branch, weight, bias, scale = make(4, 64)
    total, normed = reference(x, branch, weight, bias, scale, 1e-6, x.dtype)
    assert torch.equal(total, x + branch * scale)
    assert torch.equal(normed, F.layer_norm(total, (64,), weight, bias, 1e-6))


@pytest.mark.parametrize("shape", [(0, 8), (3, 1), (8,), (2, 0, 4)])
def test_any_shape(shape: tuple[int, ...]):
    total, normed = run(make(*shape))
    assert total.shape == normed.shape == shape and not normed.isnan().any()


def test_strides_and_what_is_not_finite():
    parts = make(6, 8)
    strided = [part if part.ndim == 1 else part.T.contiguous().T for part in parts]
    assert all(map(torch.equal, run(parts), run(strided)))
    parts[0][2, 3] = float("nan")
    total, normed = run(parts)
    assert normed[2].isnan().all() and not normed[[0, 1, 3, 4, 5]].isnan().any()
    assert int(total.isnan().sum()) == 1


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients(scaled: bool):
    parts = [None if p is None else p.requires_grad_() for p in wide(make(2, 5, scaled=scaled))]

    def both(*given):
        total, normed = run([*given, None] if len(given) == 4 else list(given))
        return total + 2 * normed

    assert torch.autograd.gradcheck(both, [p for p in parts if p is not None])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({1: torch.zeros(2, 4)}, ValueError, r"branch must have shape \(2, 3\), got \(2, 4\)"),
        ({2: torch.zeros(4)}, ValueError, r"weight must have shape \(3,\)"),
        ({3: torch.zeros(3, dtype=torch.float16)}, TypeError, "bias must be torch.float32"),
        ({4: torch.zeros(1, 3)}, ValueError, r"scale must have shape \[C\]"),
        ({1: torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "branch must fit into x's"),
        ({0: torch.zeros(2, 0), 1: torch.zeros(2, 0), 2: torch.zeros(0), 3: torch.zeros(0),
          4: torch.zeros(0)}, ValueError, "at least one channel"),
    ],
)  # fmt: skip
def test_errors(change: dict, error: type, message: str):
    parts = [change.get(i, part) for i, part in enumerate(make(2, 3))]
    with pytest.raises(error, match=f"^add_norm: .*{message}"):
        run(parts)


def test_options_that_are_wrong():
    with pytest.raises(TypeError, match="dtype must be floating point, got torch.int8"):
        run(make(2, 3), dtype=torch.int8)
    with pytest.raises(ValueError, match="eps must be finite and at least 0, got -1"):
        ops.add_norm(*make(2, 3)[:4], eps=-1)


@pytest.mark.slow
def test_compiles(check_error):
    parts = make(4, 16)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(parts), run(parts), strict=True):
        torch.testing.assert_close(got, want)
