"""The Triton search against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import vfmtok_fast
from vfmtok_fast import ops

pytest.importorskip("triton")
from vfmtok_fast.kernels import nearest_code as kernel

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
LAUNCHES = ("_prepare", "_screen", "_rescan", "_resolve", "_merge")
HERE = pytest.mark.skipif(not INTERPRETED, reason="runs in the child pytest")
runs = pytest.mark.gpu if GPU else HERE
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.slow
@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests below run here")
def test_in_the_interpreter(run_in_interpreter):
    run_in_interpreter(__file__)


@pytest.fixture(autouse=True)
def small_grids(monkeypatch):
    """The interpreter runs one program after the other."""
    if not GPU:
        monkeypatch.setattr(kernel, "MAX_SPLITS", 4)
        monkeypatch.setattr(kernel, "RESOLVE_PROGRAMS", 2)


@pytest.fixture
def launched(record):
    return record(kernel, *LAUNCHES)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def truth(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """float64 cosines [N, K]; equal codes get equal bits, as no matrix product promises."""
    z, codebook = F.normalize(z.double(), dim=-1), F.normalize(codebook.double(), dim=-1)
    scores = torch.zeros(z.shape[0], codebook.shape[0], dtype=torch.float64)
    for i in range(z.shape[1]):
        scores += z[:, i, None] * codebook[:, i]
    return scores


def search(z: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    code, score = kernel.nearest_code(z.to(DEVICE), codebook.to(DEVICE), return_score=True)
    return code.cpu(), score.cpu()


def check(z: torch.Tensor, codebook: torch.Tensor) -> None:
    code, score = search(z, codebook)
    best, expected = truth(z, codebook).max(dim=1)
    assert torch.equal(code, expected), f"{int((code != expected).sum())} wrong rows"
    torch.testing.assert_close(score.double(), best, rtol=0, atol=2 * 2.0**-24)


def near_ties(gap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Every query between two codes whose scores differ by about ``gap``, far apart in order."""
    codebook = F.normalize(random(600, 12, seed=1), dim=1)
    codebook[300:] = codebook[:300] * (1 + gap * random(300, 12, seed=2))
    return codebook[:150] + 0.01 * random(150, 12, seed=3), codebook


@runs
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [
        (1, 1, 4),
        (1, 700, 12),
        (130, 1, 12),
        (65, 1025, 31),
        (40, 129, 8),
        (9, 300, 16),
        (9, 99, 64),
    ],
)
def test_shapes(n: int, k: int, d: int, launched):
    check(random(n, d), random(k, d, seed=1))
    assert all(len(recorder.launches) == 1 for recorder in launched.values())


@runs
@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-6])
def test_clustered_codebook(spread: float):
    centres = random(4, 12, seed=1)
    codebook = centres[torch.arange(500) % 4] + spread * random(500, 12, seed=2)
    check(codebook[::9] + spread * random(56, 12, seed=3), codebook)


@runs
@pytest.mark.parametrize("gap", [1e-5, 1e-6, 1e-7])
def test_near_ties(gap: float):
    check(*near_ties(gap))


@runs
def test_a_bound_that_is_too_small_is_seen(monkeypatch):
    """The other tests are worth something: without the certificate they fail."""
    monkeypatch.setattr(kernel, "BOUND", 0.0)
    with pytest.raises(AssertionError, match="wrong rows"):
        check(*near_ties(1e-5))


def errors_of_the_screen(z: torch.Tensor, codebook: torch.Tensor, screen) -> tuple:
    """How far its best scores are off, and how far they may be: half the slack, as cosines."""
    search(z, codebook)
    (launch,) = screen.launches
    best, slack = launch[3].double().amax(1).cpu(), launch[6].double().cpu()
    # The kernel's own units: queries scaled to a largest value in [1, 2), and both its scales.
    size = torch.ldexp(z, 1 - torch.frexp(z.abs().amax(1, keepdim=True)).exponent).double()
    unit = size.norm(dim=1) * kernel.Z_SCALE.value * kernel.E_SCALE.value
    return (best / unit - truth(z, codebook).amax(1)).abs(), slack / unit / 2


@runs
def test_the_screen_stays_within_its_bound(launched):
    error, bound = errors_of_the_screen(
        random(128, 12), random(900, 12, seed=1), launched["_screen"]
    )
    assert bool((error <= bound).all())
    # It is of use: hardly any code is that close to the best.
    assert float(bound.max()) < 1e-3


@runs
def test_the_worst_roundings_reach_the_bound(launched):
    """So no part of it can be left out.

    Of a code of equal magnitudes all components round alike, by R / sqrt(12) each, and those of
    the query along it by nearly half a unit in the last place: both errors lie along the product.
    """
    codebook = random(200, 12, seed=1).sign()
    z = codebook[::4] * (1 + 0.49 * 2.0**-10)
    error, bound = errors_of_the_screen(z, codebook, launched["_screen"])
    assert bool((error <= bound).all()) and bool((error >= 0.98 * bound).all())


@runs
def test_duplicated_rows_give_the_lowest_index(launched, monkeypatch):
    """Every row is a tie between chunks of one lane, so every row is resolved."""
    monkeypatch.setattr(kernel, "MAX_SPLITS", 1)  # A GPU would take a split for every tile.
    codebook = random(128, 12, seed=1).repeat(9, 1)
    check(random(20, 12), codebook)
    assert int(launched["_screen"].launches[0][2][0]) == 20
    # Nearly equal, so that the answers are all over the codebook, in its last tile too.
    codebook *= 1 + 1e-6 * random(len(codebook), 12, seed=2)
    check(random(60, 12), codebook)
    assert int(launched["_screen"].launches[1][2][0]) == 60


@runs
def test_a_tie_between_chunks_gives_the_lowest_index(monkeypatch):
    """The later of two equal codes stands in the lane that is looked at first."""
    monkeypatch.setattr(kernel, "MAX_SPLITS", 1)
    codebook = random(256, 12, seed=1)
    codebook[128:160] = codebook[96:128]
    check(codebook[96:128] + 0.01 * random(32, 12), codebook)


@runs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_exact_with_respect_to_the_input(dtype: torch.dtype):
    check(random(60, 12).to(dtype), random(500, 12, seed=1).to(dtype))


@runs
def test_non_contiguous_input():
    check(random(12, 60).T, random(500, 24, seed=1)[:, ::2])


@runs
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e37])
def test_any_length_of_queries(scale: float):
    z = (random(40, 12).double().clamp(-3, 3) * scale).float()
    code, _ = search(z, random(300, 12, seed=1))
    assert torch.equal(code, truth(z.double() / scale, random(300, 12, seed=1)).max(1).indices)


@runs
def test_any_length_of_codes():
    check(
        random(40, 12),
        random(300, 12, seed=1) * 10.0 ** torch.arange(-11, 19)[:, None].repeat(10, 1),
    )


@runs
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_query_gets_code_0_and_disturbs_no_other(value: float):
    z, codebook = random(50, 12), random(300, 12, seed=1)
    expected = truth(z, codebook).max(1).indices
    z[::9, 3] = value
    expected[::9] = 0
    code, score = search(z, codebook)
    assert torch.equal(code, expected)
    assert torch.equal(score.isnan(), ~z.isfinite().all(1))


@runs
def test_zero_rows():
    z, codebook = random(20, 12), random(10, 12, seed=1)
    z[7] = codebook[4] = 0
    code, score = search(z, codebook)
    assert (code[7], score[7]) == (0, 0)
    # A zero code scores 0, which wins where all others are negative.
    check(torch.cat([z, -codebook.sum(0, keepdim=True)]), codebook)


@runs
def test_a_broken_code_shows(monkeypatch):
    """As in the reference, where NaN wins every maximum; also in rows that would be resolved."""
    monkeypatch.setattr(kernel, "MAX_SPLITS", 1)
    z, codebook = random(20, 12), random(128, 12, seed=1).repeat(3, 1)
    codebook[77:90, 5] = float("nan")
    code, score = search(z, codebook)
    assert bool((code == 77).all()) and bool(score.isnan().all())


@runs
def test_empty():
    code, score = search(random(0, 12), random(5, 12))
    assert code.shape == score.shape == (0,) and code.dtype == torch.int64


@runs
@given(
    n=st.integers(1, 20), k=st.integers(1, 200), d=st.integers(4, 64), seed=st.integers(0, 2**31),
    levels=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_coarse_values_tie_often(n: int, k: int, d: int, seed: int, levels: int):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randint(-levels, levels + 1, (n, d), generator=draw).float()
    codebook = torch.randint(-levels, levels + 1, (k, d), generator=draw).float()
    code, _ = search(z, codebook)
    scores = truth(z, codebook)
    # Scaled copies differ by float64 roundings, which are no gap.
    assert bool((scores.gather(1, code[:, None])[:, 0] >= scores.amax(1) - 1e-13).all())


@runs
def test_the_switch_takes_it_and_says_why_not():
    z, codebook = random(20, 12).to(DEVICE), random(300, 12, seed=1).to(DEVICE)
    with vfmtok_fast.enable("nearest_code", strict=True):
        assert torch.equal(ops.nearest_code(z, codebook).cpu(), search(z, codebook)[0])
        assert vfmtok_fast.status().ops["nearest_code"].calls["triton"] >= 1
        with pytest.raises(RuntimeError, match="directions only"):
            ops.nearest_code(z, codebook, normalize=False)
        with pytest.raises(RuntimeError, match="not torch.float64"):
            ops.nearest_code(z.double(), codebook.double())
        with pytest.raises(RuntimeError, match="not 65"):
            ops.nearest_code(z.repeat(1, 6)[:, :65], codebook.repeat(1, 6)[:, :65])


@runs
@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad: bool):
    z = random(20, 12).to(DEVICE).requires_grad_(needs_grad)
    op = torch.ops.vfmtok_fast.nearest_code_triton
    torch.library.opcheck(op, (z, random(300, 12, seed=1).to(DEVICE)))


@runs
def test_torch_compile_takes_it_without_a_graph_break():
    z, codebook = random(20, 12).to(DEVICE), random(300, 12, seed=1).to(DEVICE)
    compiled = torch.compile(lambda z, e: ops.nearest_code(z * 2, e) + 1, fullgraph=True)
    with vfmtok_fast.enable("nearest_code", strict=True):
        assert torch.equal(compiled(z, codebook), ops.nearest_code(z, codebook) + 1)
        assert "triton (compiled)" in vfmtok_fast.status().ops["nearest_code"].calls


@pytest.mark.gpu
def test_a_million_rows():
    """Against the portable search, which is exact too and tested on its own."""
    from vfmtok_fast.portable.nearest_code import nearest_code as portable

    z, codebook = random(10**6, 12).cuda(), random(16384, 12, seed=1).cuda()
    assert torch.equal(kernel.nearest_code(z, codebook), portable(z, codebook))


@pytest.mark.gpu
def test_cuda_graph_and_stream():
    z, codebook = random(3000, 12).cuda(), random(16384, 12, seed=1).cuda()
    expected = kernel.nearest_code(z, codebook)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(kernel.nearest_code(z, codebook), expected)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernel.nearest_code(z, codebook)
    z.copy_(random(3000, 12, seed=5))
    graph.replay()
    assert torch.equal(captured, kernel.nearest_code(z, codebook))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    z, codebook = random(300, 12), random(1000, 12, seed=1)
    code = kernel.nearest_code(z.to("cuda:1"), codebook.to("cuda:1"))
    assert torch.equal(code.cpu(), truth(z, codebook).max(1).indices)
