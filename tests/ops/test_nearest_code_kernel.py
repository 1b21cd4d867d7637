"""Triton's nearest_code against float64, on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import contextlib
import itertools
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from where_kernels_run import BACKEND, DEVICE, GPU, combined, in_the_interpreter, runs

import vfmtok_fast
from vfmtok_fast import ops

pytest.importorskip("triton")
from vfmtok_fast.kernels import nearest_code as kernel

LAUNCHES = {"_insert": 1, "_prepare": 1, "_screen": 2, "_rescan": 2}
# Positions among the arguments of _screen.
COUNT, BEST, SLACK = 4, 5, 8
pytestmark = pytest.mark.usefixtures("poison")


test_in_the_interpreter = in_the_interpreter(__file__)


@pytest.fixture(autouse=True)
def small_grids(monkeypatch):
    """Use small grids in the interpreter, which runs one program after another."""
    if not GPU:
        monkeypatch.setattr(kernel, "MAX_SPLITS", 4)
        monkeypatch.setattr(kernel, "SPLITS_AGAIN", 4)
        monkeypatch.setattr(kernel, "PROGRAMS_AGAIN", 2)


SCORES = ["float32 64", "float16 128"]


@pytest.fixture(params=SCORES)
def scores(request):
    """Select the form of the first screen."""
    kind, tile = request.param.split()
    values = {"scores": kind, "tile": int(tile), "rows": 64, "warps": 4, "stages": 2}
    with kernel.SCREEN.using(kernel.SCREEN.setting(values)):
        yield kind


@pytest.fixture
def launched(record):
    return record(kernel, *LAUNCHES)


def listed(launched, call: int = -1) -> int:
    """Return how many rows the first screen of a call could not certify."""
    return int(launched["_screen"].launches[2 * call][COUNT][0])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def truth(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Return float64 cosines [N, K]; equal codes get equal bits, unlike in a matrix product."""
    z, codebook = F.normalize(z.double(), dim=-1), F.normalize(codebook.double(), dim=-1)
    scores = torch.zeros(z.shape[0], codebook.shape[0], dtype=torch.float64)
    for i in range(z.shape[1]):
        scores += z[:, i, None] * codebook[:, i]
    return scores


def search(z: torch.Tensor, codebook: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, ...]:
    code, score = kernel.nearest_code(z.to(DEVICE), codebook.to(DEVICE), k=k, return_score=True)
    return code.cpu(), score.cpu()


def check(z: torch.Tensor, codebook: torch.Tensor, k: int = 1) -> None:
    code, score = search(z, codebook, k)
    assert code.shape == score.shape == ((len(z),) if k == 1 else (len(z), k))
    best, expected = truth(z, codebook).sort(dim=1, descending=True, stable=True)
    wrong = code.view(len(z), k) != expected[:, :k]
    assert not wrong.any(), f"{int(wrong.any(1).sum())} wrong rows"
    score = score.view(len(z), k).double()
    torch.testing.assert_close(score, best[:, :k], rtol=0, atol=2 * 2.0**-24)


def near_ties(gap: float, copies: int = 2, n: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries between ``copies`` codes whose scores differ by about ``gap``, and the codes.

    These codes are far apart in the codebook.
    """
    base = F.normalize(random(2 * n, 12, seed=1), dim=1)
    codebook = base.repeat(copies, 1)
    codebook[2 * n :] *= 1 + gap * random(len(codebook) - 2 * n, 12, seed=2)
    return base[:n] + 0.01 * random(n, 12, seed=3), codebook


@runs
@pytest.mark.parametrize(
    ("shape", "scores"),
    combined(
        [
            (1, 1, 4),
            (1, 700, 12),
            (130, 1, 12),
            # Two tiles of rows, and spans that the splits cannot share evenly, for either form.
            (65, 1025 if GPU else 600, 31),
            *[(65, 600, 31)] * (not GPU),
            (40, 129, 8),
            (9, 300, 16),
            (9, 99, 64),
        ],
        SCORES,
    ),
    indirect=["scores"],
)
def test_shapes(shape: tuple[int, int, int], launched, scores):
    n, k, d = shape
    check(random(n, d), random(k, d, seed=1))
    assert {name: len(kernel.launches) for name, kernel in launched.items()} == LAUNCHES


def ends(space) -> list[tuple]:
    """Return (space, setting) with the first and last value of every choice, one at a time."""
    tried = []
    for name, values in space.choices.items():
        if name in ("stages", "warps"):  # The interpreter has neither.
            continue
        for value in {values[0], values[-1]}:
            near = [s for s in space.candidates() if getattr(s, name) == value]
            default = space.defaults[80]
            tried.append(max(near, key=lambda s: sum(map(operator.eq, s, default))))
    return [(space, setting) for setting in dict.fromkeys(tried)]


def groups_of_settings() -> list[list[tuple]]:
    """Each setting by itself on a GPU, else one per kernel at a time; kernels share none."""
    every = [ends(space) for space in kernel.SPACES]
    if GPU:
        return [[one] for one in itertools.chain(*every)]
    return [[one for one in group if one] for group in itertools.zip_longest(*every)]


@runs
def test_no_setting_changes_a_bit():
    """The result is certified for every setting."""
    z, codebook = near_ties(1e-5, n=12)
    codebook = torch.cat([codebook, codebook[:20]])
    with kernel.SCREEN.using(kernel.SCREEN.defaults[90]):
        expected = search(z, codebook)
        assert torch.equal(expected[0], truth(z, codebook).max(1).indices)
    for group in groups_of_settings():
        with contextlib.ExitStack() as stack:
            for space, setting in group:
                stack.enter_context(space.using(setting))
            code, score = search(z, codebook)
        assert torch.equal(code, expected[0]) and torch.equal(score, expected[1]), group


@runs
@pytest.mark.parametrize(("k", "scores"), combined([2, 3, 8, 8], SCORES), indirect=["scores"])
def test_several_codes(k: int, scores):
    check(random(8, 12), random(200, 12, seed=1), k)
    check(random(5, 8), random(k, 8, seed=1), k)


@runs
def test_several_codes_where_they_tie_or_nearly(monkeypatch):
    """Repeated codes come lowest index first, near ties in float64 order."""
    codebook = random(40, 12, seed=1).repeat(4, 1)
    check(codebook[:12] + 0.1 * random(12, 12), codebook, 3)
    check(*near_ties(1e-6), k=2)
    # k equal to the number of codes, and all codes equal.
    check(random(9, 12), codebook[:6], 6)
    check(random(9, 12), random(1, 12, seed=1).expand(40, 12), 8)


@runs
@pytest.mark.parametrize("spread", [1e-1, 1e-6])
def test_clustered_codebook(spread: float):
    centres = random(4, 12, seed=1)
    codebook = centres[torch.arange(200) % 4] + spread * random(200, 12, seed=2)
    check(codebook[::15] + spread * random(14, 12, seed=3), codebook)


@runs
@pytest.mark.parametrize(
    ("gap", "scores"), combined([1e-5, 1e-6, 1e-7], SCORES), indirect=["scores"]
)
def test_near_ties(gap: float, scores):
    check(*near_ties(gap))


@runs
@pytest.mark.parametrize(("k", "scores"), combined([1, 2], SCORES), indirect=["scores"])
def test_a_bound_that_is_too_small_is_seen(k: int, scores, monkeypatch):
    """Without the certificate the other tests fail, so they prove something."""
    monkeypatch.setattr(kernel, "BOUND", 0.0)
    with pytest.raises(AssertionError, match="wrong rows"):
        check(*near_ties(1e-5, copies=k + 1), k)


@runs
def test_so_is_that_of_the_second_screen(monkeypatch):
    monkeypatch.setattr(kernel, "BOUND", 1e3)  # Every row goes to the second screen.
    monkeypatch.setattr(kernel, "BOUND_AGAIN", 0.0)
    with pytest.raises(AssertionError, match="wrong rows"):
        check(*near_ties(1e-6))


def errors_of_the_screen(z, codebook, screen, again: bool = False) -> tuple:
    """Return the errors of a screen's best scores and their bound, half the slack, as cosines."""
    search(z, codebook)
    launch, constants = screen.launches[again], screen.constants[again]
    best, slack = launch[BEST].double().cpu(), launch[SLACK].double().cpu()
    # For the second screen: the listed rows in list order, and their first splits * LANES values.
    row = launch[COUNT - 1].cpu() if again else torch.arange(len(z))
    slots = constants["SPLITS"] * 4
    best = best.flatten()[: len(z) * slots].view(len(z), slots).amax(1)
    # The kernel's own units: queries scaled to a largest value in [1, 2), and both scale factors.
    size = torch.ldexp(z, 1 - torch.frexp(z.abs().amax(1, keepdim=True)).exponent).double()
    unit = (size.norm(dim=1) * 256 * (64 if constants["WIDE"] else 1))[row]
    return (best / unit - truth(z, codebook).amax(1)[row]).abs(), slack / unit / 2


# Most that a score loses if its key holds the column in the last bits.
CUT = 64 * 2.0**-23


@runs
def test_the_screen_stays_within_its_bound(launched, scores):
    error, bound = errors_of_the_screen(
        random(128 if GPU else 70, 12), random(900 if GPU else 300, 12, seed=1), launched["_screen"]
    )
    assert bool((error <= bound + CUT).all())
    # The bound is useful: hardly any code is that close to the best.
    assert float(bound.max()) < (1e-3 if scores == "float32" else 2e-3)


@runs
def test_so_does_the_second(launched, monkeypatch):
    monkeypatch.setattr(kernel, "BOUND", 1e3)
    z, codebook = random(128 if GPU else 40, 12), random(900 if GPU else 300, 12, seed=1)
    error, bound = errors_of_the_screen(z, codebook, launched["_screen"], again=True)
    assert listed(launched) == len(z)
    assert bool((error <= bound).all()) and float(bound.max()) < 2e-5


@runs
def test_the_worst_roundings_reach_the_bound(launched):
    """The bound has no superfluous part.

    All components of a code of equal magnitudes round alike, by R / sqrt(12) each. Those of a query
    along it round by nearly half a unit in the last place. So both errors point along the product.
    """
    codebook = random(200, 12, seed=1).sign()
    z = codebook[::4] * (1 + 0.49 * 2.0**-10)
    with kernel.SCREEN.using(kernel.SCREEN.defaults[80]):
        error, bound = errors_of_the_screen(z, codebook, launched["_screen"])
    assert bool((error <= bound + CUT).all()) and bool((error >= 0.98 * bound - CUT).all())


@runs
@pytest.mark.parametrize("scores", SCORES if GPU else SCORES[1:], indirect=True)
def test_every_row_can_be_listed_and_come_back(launched, monkeypatch, scores):
    """Clusters are tighter than the first screen's bound; the second screen separates them."""
    monkeypatch.setattr(kernel, "MAX_SPLITS", 1)
    codebook = random(4, 12, seed=1)[torch.arange(300) % 4] + 1e-3 * random(300, 12, seed=2)
    check(codebook[::15] + 1e-3 * random(20, 12, seed=3), codebook)
    assert listed(launched) == 20


@runs
def test_duplicated_rows_give_the_lowest_index(launched, monkeypatch):
    """They cost no extra work: only the lowest of equal codes takes part in the screens."""
    monkeypatch.setattr(kernel, "MAX_SPLITS", 1)  # A GPU would use one split per tile.
    codebook = random(60, 12, seed=1).repeat(9, 1)
    check(random(20, 12), codebook)
    assert listed(launched) < 5
    # It holds too if all codes share one table slot, so that most duplicates are not detected.
    monkeypatch.setattr(kernel, "_table", lambda codes: 1)
    check(random(20, 12), codebook)
    # Nearly equal codes, so that results are all over the codebook, its last tile included.
    codebook *= 1 + 1e-6 * random(len(codebook), 12, seed=2)
    check(random(20, 12), codebook)
    assert listed(launched) == 20


@runs
def test_one_code_over_and_over(launched):
    """Queries on its far side have only negative scores, which no screen certifies."""
    z = random(30, 12)
    check(z, random(1, 12, seed=1).expand(300, 12))
    assert 5 < listed(launched) < 25
    check(-z.abs(), random(50, 12, seed=1).abs())


@runs
def test_a_tie_between_chunks_gives_the_lowest_index(monkeypatch):
    """The later of two equal codes is in the lane that is read first."""
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
def test_any_length_of_queries():
    scale = torch.tensor([1e-42, 1e-30, 1e37], dtype=torch.float64).repeat(14)[:40, None]
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
def test_a_broken_query_gets_code_0_and_disturbs_no_other():
    z, codebook = random(50, 12), random(300, 12, seed=1)
    expected = truth(z, codebook).max(1).indices
    z[::9, 3] = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(2)
    expected[::9] = 0
    code, score = search(z, codebook)
    assert torch.equal(code, expected)
    assert torch.equal(score.isnan(), ~z.isfinite().all(1))
    code, score = search(z, codebook, k=2)
    assert code[::9].tolist() == [[0, 1]] * 6 and bool(score[::9].isnan().all())
    assert torch.equal(code[:, 0], expected) and not score[1].isnan().any()


@runs
def test_zero_rows():
    z, codebook = random(20, 12), random(10, 12, seed=1)
    z[7] = codebook[4] = 0
    code, score = search(z, codebook)
    assert (code[7], score[7]) == (0, 0)
    code, score = search(z, codebook, k=3)
    assert code[7].tolist() == [0, 1, 2] and score[7].tolist() == [0, 0, 0]
    # A zero code scores 0, which wins where all others are negative.
    check(torch.cat([z, -codebook.sum(0, keepdim=True)]), codebook)


@runs
def test_a_broken_code_shows(monkeypatch):
    """As in the reference, NaN wins every maximum, also in rows that would be rescanned."""
    monkeypatch.setattr(kernel, "MAX_SPLITS", 1)
    z, codebook = random(20, 12), random(128, 12, seed=1).repeat(3, 1)
    codebook[77:90, 5] = float("nan")
    code, score = search(z, codebook)
    assert bool((code == 77).all()) and bool(score.isnan().all())
    code, score = search(z, codebook, k=3)
    assert code.tolist() == [[77, 0, 1]] * 20 and bool(score.isnan().all())
    codebook[0, 0] = float("inf")
    assert search(z, codebook, k=2)[0].tolist() == [[0, 1]] * 20


@runs
def test_empty():
    code, score = search(random(0, 12), random(5, 12))
    assert code.shape == score.shape == (0,) and code.dtype == torch.int64


@runs
@given(
    n=st.integers(1, 20), k=st.integers(1, 200), d=st.integers(4, 64), seed=st.integers(0, 2**31),
    levels=st.integers(1, 4), take=st.integers(1, 4),
)  # fmt: skip
@settings(max_examples=10 if GPU else 6, deadline=None)
def test_coarse_values_tie_often(n: int, k: int, d: int, seed: int, levels: int, take: int):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randint(-levels, levels + 1, (n, d), generator=draw).float()
    codebook = torch.randint(-levels, levels + 1, (k, d), generator=draw).float()
    take = min(take, k)
    code, _ = search(z, codebook, take)
    code = code.view(n, take)
    scores = truth(z, codebook)
    # Scaled copies differ by float64 roundings, which do not count.
    assert bool((scores.gather(1, code) >= scores.topk(take).values - 1e-13).all())
    assert all(len(set(row)) == take for row in code.tolist())


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
    z = random(6, 12).to(DEVICE).requires_grad_(needs_grad)
    op = torch.ops.vfmtok_fast.nearest_code_triton
    torch.library.opcheck(op, (z, random(40, 12, seed=1).to(DEVICE), 1 + needs_grad))


@runs
def test_torch_compile_takes_it_without_a_graph_break():
    z, codebook = random(20, 12).to(DEVICE), random(300, 12, seed=1).to(DEVICE)
    compiled = torch.compile(
        lambda z, e: ops.nearest_code(z * 2, e) + 1, backend=BACKEND, fullgraph=True
    )
    with vfmtok_fast.enable("nearest_code", strict=True):
        assert torch.equal(compiled(z, codebook), ops.nearest_code(z, codebook) + 1)
        assert "triton (compiled)" in vfmtok_fast.status().ops["nearest_code"].calls


@pytest.mark.gpu
def test_a_million_rows():
    """The expected codes come from the CPU search, which is exact and has its own tests."""
    from vfmtok_fast.cpu.nearest_code import nearest_code as cpu

    z, codebook = random(10**6, 12).cuda(), random(16384, 12, seed=1).cuda()
    assert torch.equal(kernel.nearest_code(z, codebook), cpu(z, codebook))


@runs
def test_rows_in_rounds(launched, monkeypatch):
    """More rows than scratch memory holds are searched in rounds, each with its own list."""
    monkeypatch.setattr(kernel, "BLOCK_ROWS", 30)
    check(random(70, 12), random(200, 12, seed=1))
    check(*near_ties(1e-6), k=2)
    assert len(launched["_screen"].launches) == 2 * (3 + 2)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["clusters 0.1", "clusters 0.03", "half duplicated", "one code"])
def test_no_distribution_is_wrong(kind: str):
    """At full size; benchmarks/bench_nearest_code.py measures that none of them is slow."""
    from vfmtok_fast.cpu.nearest_code import nearest_code as cpu

    z, codebook = random(65536, 12).cuda(), random(16384, 12, seed=1).cuda()
    if kind.startswith("clusters"):
        centres = F.normalize(random(64, 12, seed=2), dim=1).cuda()
        codebook = centres.repeat(256, 1) + float(kind.split()[1]) * codebook
        z = centres.repeat(1024, 1) + float(kind.split()[1]) * z
    elif kind == "half duplicated":
        codebook[8192:] = codebook[:8192]
    else:
        codebook[:] = codebook[0]
    assert torch.equal(kernel.nearest_code(z, codebook), cpu(z, codebook))


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
