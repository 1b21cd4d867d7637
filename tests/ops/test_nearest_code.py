"""nearest_code against brute force in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vfmtok_fast.ops import nearest_code

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distances(z: Tensor, codebook: Tensor, normalize: bool) -> Tensor:
    """Return squared Euclidean distances in float64, one pair at a time."""
    z, codebook = z.double(), codebook.double()
    if normalize:
        z = z / z.norm(dim=-1, keepdim=True)
        codebook = codebook / codebook.norm(dim=-1, keepdim=True)
    return (z[:, None] - codebook[None]).square().sum(-1)


def check(z: Tensor, codebook: Tensor, code: Tensor, normalize: bool) -> int:
    """Require the nearest code, except for ties within rounding; return the number of such ties.

    Two scores of length-d dot products, each wrong by up to gamma = (d + 4) eps times the sum of
    magnitudes (d products and sums, four roundings of the normalisation), may swap if their
    distances, twice the scores, differ by less than 4 gamma.
    """
    assert code.dtype == torch.int64 and code.shape == (len(z),)
    distance = distances(z, codebook, normalize)
    eps = torch.finfo(torch.float64 if z.dtype == torch.float64 else torch.float32).eps
    magnitude = z.double().abs() @ codebook.double().abs().T + codebook.double().square().sum(-1)
    scale = 1.0 if normalize else float(magnitude.max())
    slack = 4 * (z.shape[1] + 4) * eps * scale
    chosen = distance.gather(1, code[:, None])[:, 0]
    best, index = distance.min(dim=-1)
    wrong = code != index
    assert torch.all(chosen - best <= slack)
    return int(wrong.sum())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K", "d"), [(256, 1024, 12), (33, 257, 8), (7, 5, 1), (64, 300, 64)])
def test_matches_brute_force(N, K, d, dtype, normalize):
    z, codebook = normal(N, d, seed=1, dtype=dtype), normal(K, d, seed=2, dtype=dtype)
    ties = check(z, codebook, nearest_code(z, codebook, normalize=normalize), normalize)
    # With d = 1 every direction ties; otherwise only half precision makes rows equal at all.
    assert d == 1 or ties == 0


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 40), K=st.integers(1, 70), d=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1e3]), normalize=st.booleans(),
)  # fmt: skip
def test_matches_brute_force_for_any_shape(N, K, d, seed, scale, normalize):
    z, codebook = normal(N, d, seed=seed) * scale, normal(K, d, seed=seed + 1)
    code = nearest_code(z, codebook, normalize=normalize)
    assert code.shape == (N,) and code.dtype == torch.int64
    if N:
        check(z, codebook, code, normalize)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), d=st.integers(1, 6), K=st.integers(1, 40), normalize=st.booleans())
def test_exact_ties_take_the_lowest_index(data, d, K, normalize):
    """One-hot rows have exact scores, so ties are exact."""
    hot = data.draw(st.lists(st.integers(0, d - 1), min_size=K, max_size=K))
    codebook = torch.eye(d)[hot]
    code = nearest_code(torch.eye(d), codebook, normalize=normalize)
    for axis, got in enumerate(code.tolist()):
        # An axis that no code holds is equally far from all of them.
        assert got == (hot.index(axis) if axis in hot else 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_of_duplicate_rows_the_first_is_chosen(dtype, normalize):
    """Codes are corners of a cube, of length 2: sums are exact in any order of addition.

    If sums round, equal codes may get different bits, because a matrix product may treat its last
    columns differently.
    """
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=dtype)] * 4)
    order = torch.randperm(16 * 21, generator=torch.Generator().manual_seed(4)) % 16
    first = torch.tensor([order.tolist().index(row) for row in range(16)])
    assert torch.equal(nearest_code(corners, corners[order], normalize=normalize), first)


def test_a_row_finds_itself_whatever_its_length():
    codebook = normal(500, 12, seed=5)
    length = torch.logspace(-6, 6, 500)[:, None]
    assert torch.equal(nearest_code(codebook * length, codebook), torch.arange(500))


def test_lengths_count_without_normalize():
    codebook = torch.tensor([[10.0, 0.0], [1.0, 0.0], [0.0, 0.1]])
    z = torch.tensor([[1.2, 0.0], [7.0, 1.0], [0.0, 0.0]])
    assert nearest_code(z, codebook, normalize=False).tolist() == [1, 0, 2]
    assert nearest_code(z, codebook).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf"), float("-inf")])
def test_rows_without_a_direction_get_code_0(dtype, bad):
    z, codebook = normal(6, 12, seed=6, dtype=dtype), normal(40, 12, seed=7, dtype=dtype)
    good = nearest_code(z, codebook)
    assert good[4] != 0
    spoilt = z.clone()
    spoilt[4] = 0 if bad == 0 else spoilt[4]
    spoilt[4, 3] = bad
    code = nearest_code(spoilt, codebook)
    assert code[4] == 0
    keep = torch.arange(6) != 4
    assert torch.equal(code[keep], good[keep])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_gets_code_0_without_normalize(bad: float):
    z = torch.tensor([[1.0, bad], [0.0, 1.0]])
    code, score = nearest_code(z, torch.eye(2), normalize=False, return_score=True)
    assert code.tolist() == [0, 1] and score.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_whose_squares_overflow(dtype):
    z, codebook = normal(30, 12, seed=3, dtype=dtype), normal(90, 12, seed=4, dtype=dtype)
    want = nearest_code(z, codebook)
    assert torch.equal(nearest_code(z * 2.0**100, codebook), want)
    codebook[::2] *= 2.0**90
    assert torch.equal(nearest_code(z, codebook), want)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_score_is_that_of_the_chosen_row(dtype, normalize):
    z, codebook = normal(40, 12, seed=8, dtype=dtype), normal(90, 12, seed=9, dtype=dtype)
    code, score = nearest_code(z, codebook, normalize=normalize, return_score=True)
    assert torch.equal(code, nearest_code(z, codebook, normalize=normalize))
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    assert score.dtype == exact and score.shape == (40,)
    chosen = distances(z, codebook, normalize).gather(1, code[:, None])[:, 0]
    # |z - e|^2 = |z|^2 - 2 score, with |z| = 1, |e| = 1 and the score a cosine under normalize.
    square = torch.full((40,), 2.0).double() if normalize else z.double().square().sum(-1)
    want = (square - chosen) / 2
    # d products, d sums and the four roundings of normalisation, of numbers up to `size`.
    size = 1.0 if normalize else float(square.max() + codebook.double().square().sum(-1).max())
    bound = (12 + 4) * torch.finfo(exact).eps * size
    assert (score.double() - want).abs().max() <= bound


@pytest.mark.parametrize("normalize", [True, False])
def test_no_rows_and_one_code(normalize):
    code, score = nearest_code(
        torch.empty(0, 12), normal(5, 12, seed=1), normalize=normalize, return_score=True
    )
    assert code.shape == score.shape == (0,) and code.dtype == torch.int64
    one = nearest_code(normal(9, 12, seed=1), normal(1, 12, seed=2), normalize=normalize)
    assert one.tolist() == [0] * 9


def test_strided_input():
    z, codebook = normal(12, 30, seed=1).T, normal(12, 80, seed=2).T
    assert not z.is_contiguous()
    assert torch.equal(nearest_code(z, codebook), nearest_code(z.contiguous(), codebook.clone()))


def test_has_no_gradient():
    z = normal(4, 12, seed=1).requires_grad_()
    code, score = nearest_code(z, normal(5, 12, seed=2).requires_grad_(), return_score=True)
    assert not code.requires_grad and not score.requires_grad


@settings(max_examples=60, deadline=None)
@given(
    N=st.integers(0, 20), K=st.integers(1, 70), d=st.integers(1, 20), k=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1), normalize=st.booleans(),
)  # fmt: skip
def test_k_are_in_order_and_the_best(N, K, d, k, seed, normalize):
    k = min(k, K)
    z, codebook = normal(N, d, seed=seed), normal(K, d, seed=seed + 1)
    code, score = nearest_code(z, codebook, k=k, normalize=normalize, return_score=True)
    shape = (N,) if k == 1 else (N, k)
    assert code.shape == score.shape == shape and code.dtype == torch.int64
    if not N:
        return
    code, score = code.view(N, k), score.view(N, k)
    assert bool((score[:, :-1] >= score[:, 1:]).all())
    assert all(len(set(row)) == k for row in code.tolist())
    # The i-th code is as near as the i-th nearest, within the slack that `check` explains.
    distance = distances(z, codebook, normalize)
    magnitude = z.double().abs() @ codebook.double().abs().T + codebook.double().square().sum(-1)
    scale = 1.0 if normalize else float(magnitude.max())
    gap = distance.gather(1, code) - distance.sort(dim=1).values[:, :k]
    assert bool((gap.abs() <= 4 * (d + 4) * 2.0**-23 * scale).all())


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_codes_come_in_order_of_index(normalize):
    """One-hot rows have exact scores."""
    codebook = torch.eye(3)[[2, 0, 1, 0, 1, 0]]
    want = [[1, 3, 5, 0], [2, 4, 0, 1], [0, 1, 2, 3]]
    assert nearest_code(torch.eye(3), codebook, k=4, normalize=normalize).tolist() == want


def test_k_of_rows_and_codes_without_a_direction():
    z, codebook = normal(3, 12, seed=1), normal(9, 12, seed=2)
    z[1], z[2, 3] = 0, float("nan")
    good = nearest_code(z[:1], codebook, k=3)
    code, score = nearest_code(z, codebook, k=3, return_score=True)
    assert torch.equal(code[:1], good) and code[1:].tolist() == [[0, 1, 2]] * 2
    assert score[1].tolist() == [0.0] * 3 and bool(score[2].isnan().all())
    for bad in (float("nan"), float("inf"), float("-inf")):
        codebook[[1, 7], 4] = bad
        for normalize in (True, False):
            code, score = nearest_code(z[:2], codebook, k=3, normalize=normalize, return_score=True)
            assert code.tolist() == [[1, 0, 2]] * 2 and bool(score.isnan().all())


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_distances_far_from_the_origin(offset):
    """In float32 z.e - |e|^2 / 2 cancels, which gave 298 of these 300 rows a wrong code."""
    z, codebook = normal(300, 12, seed=1) + offset, normal(500, 12, seed=2) + offset
    want = torch.cdist(z.double() - offset, codebook.double() - offset).argmin(1)
    code, score = nearest_code(z, codebook, normalize=False, return_score=True)
    assert torch.equal(code, want) and score.dtype == torch.float32


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (0, ValueError, "k must be 1 to 8 and at most K = 5, got 0"),
        (6, ValueError, "k must be 1 to 8 and at most K = 5, got 6"),
        (1.0, TypeError, "k must be an int, got 1.0"),
        (True, TypeError, "k must be an int, got True"),
    ],
)
def test_refuses_such_a_k(k, error, message):
    with pytest.raises(error, match=f"^nearest_code: {message}$"):
        nearest_code(torch.zeros(3, 12), torch.ones(5, 12), k=k)
    with pytest.raises(ValueError, match="k must be 1 to 8"):
        nearest_code(torch.zeros(3, 12), torch.ones(50, 12), k=9)


Z, BOOK = torch.zeros(3, 12), torch.ones(5, 12)


@pytest.mark.parametrize(
    ("z", "codebook", "error", "message"),
    [
        (torch.zeros(256, 16), BOOK, ValueError, r"z must have shape \[N, 12\], got \(256, 16\)"),
        (torch.zeros(12), BOOK, ValueError, r"z must have shape \[N, 12\], got \(12,\)"),
        (torch.zeros(1, 3, 12), BOOK, ValueError, r"z must have shape \[N, 12\], got \(1, 3, 12\)"),
        (Z, torch.ones(12), ValueError, r"codebook must have shape \[K, d\], got \(12,\)"),
        (Z, torch.ones(0, 12), ValueError, r"codebook must have at least one row and column, .*12"),
        (Z[:, :0], torch.ones(5, 0), ValueError, "codebook must have at least one row and column"),
        (Z.long(), BOOK, TypeError, "z must be floating point, got torch.int64"),
        (Z, BOOK.int(), TypeError, "codebook must be floating point, got torch.int32"),
        (Z.half(), BOOK, TypeError, "codebook must be torch.float16, as z is, got torch.float32"),
        (Z.tolist(), BOOK, TypeError, "z must be a torch.Tensor, got list"),
        (Z, None, TypeError, "codebook must be a torch.Tensor, got NoneType"),
        (Z, BOOK.to("meta"), ValueError, "codebook must be on cpu, as z is, got meta"),
    ],
)
def test_refuses_in_one_line(z, codebook, error, message):
    with pytest.raises(error, match=f"^nearest_code: {message}") as caught:
        nearest_code(z, codebook)
    assert "\n" not in str(caught.value)
