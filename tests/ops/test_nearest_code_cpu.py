"""The CPU search is exact against float64 on every kind of input and needs little memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.cpu import nearest_code as cpu

OP = torch.ops.vfmtok_fast.nearest_code_cpu
ROUNDING = 2.0**-24


def truth(z: torch.Tensor, codebook: torch.Tensor, normalize: bool = True) -> torch.Tensor:
    """Return float64 scores [N, K]; equal codes get equal bits, unlike in a matrix product."""
    z, codebook = z.double(), codebook.double()
    if normalize:
        z, codebook = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    scores = torch.zeros(z.shape[0], codebook.shape[0], dtype=torch.float64)
    for i in range(z.shape[1]):
        scores += z[:, i, None] * codebook[:, i]
    return scores if normalize else scores - codebook.square().sum(-1) / 2


def check(z: torch.Tensor, codebook: torch.Tensor, normalize: bool = True, k: int = 1) -> None:
    """Check codes against the float64 order, lowest index first on ties, for k = 1 and ``k``.

    Scores must be right to one rounding.
    """
    k = min(k, len(codebook))
    ordered = truth(z, codebook, normalize).sort(dim=1, descending=True, stable=True)
    for count in {1, k}:
        code, score = cpu.nearest_code(z, codebook, k=count, normalize=normalize, return_score=True)
        shape = (z.shape[0],) if count == 1 else (z.shape[0], count)
        assert code.dtype == torch.int64 and code.shape == score.shape == shape
        best, expected = (part[:, :count].reshape(shape) for part in ordered)
        assert torch.equal(code, expected)
        # Without `normalize` the score is a difference, and its terms determine the size of a
        # rounding.
        parts = best.abs().max() + codebook.double().square().sum(1).max()
        size = 1.0 if normalize else float(parts)
        torch.testing.assert_close(score.double(), best, rtol=0, atol=2 * ROUNDING * size)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(count: int, dim: int, spread: float) -> torch.Tensor:
    centres = random(8, dim, seed=1)
    return centres[torch.arange(count) % 8] + spread * random(count, dim, seed=2)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("n", "k", "d"),
    [(1, 1, 4), (1, 16384, 12), (300, 1, 12), (65, 16385, 31), (2100, 129, 8), (3, 63, 64)],
)
def test_shapes(n: int, k: int, d: int, normalize: bool):
    check(random(n, d), random(k, d, seed=1), normalize, k=3)


@given(
    n=st.integers(1, 40), count=st.integers(1, 200), d=st.integers(2, 20), k=st.integers(1, 8),
    repeats=st.integers(1, 4), spread=st.sampled_from([1.0, 1e-3, 1e-6, 0.0]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_k_of_clusters_and_duplicates(n, count, d, k, repeats, spread, seed):
    codebook = (random(3, d, seed=seed)[torch.arange(count) % 3]).repeat(repeats, 1)
    codebook += spread * random(count, d, seed=seed + 1).repeat(repeats, 1)
    check(random(n, d, seed=seed + 2), codebook, k=k)


def test_a_codebook_of_several_blocks(monkeypatch):
    monkeypatch.setattr(cpu, "_CODES", 128)
    monkeypatch.setattr(cpu, "_ROWS", 16)
    codebook = random(1000, 12, seed=1)
    codebook[700:710] = codebook[10:20]
    z = torch.cat([random(40, 12), codebook[700:710]])
    check(z, codebook, k=8)
    check(z, codebook, normalize=False, k=8)


@pytest.mark.parametrize("spread", [1e-1, 1e-3, 1e-6])
def test_clustered_codebook(spread: float):
    codebook = clustered(1000, 12, spread)
    check(codebook[::7] + spread * random(143, 12, seed=3), codebook, k=2)


@pytest.mark.parametrize("gap", [1e-5, 1e-6, 1e-7])
def test_near_ties(gap: float):
    codebook = F.normalize(random(600, 12, seed=1), dim=1)
    codebook[300:] = codebook[:300] * (1 + gap * random(300, 12, seed=2))
    check(codebook[:300] + 1e-3 * random(300, 12, seed=3), codebook, k=2)


def test_duplicated_rows_give_the_lowest_index():
    codebook = random(64, 12, seed=1).repeat(20, 1)
    check(random(200, 12), codebook, k=8)
    assert cpu.nearest_code(random(200, 12), codebook).max() < 64


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of (row, group) pairs that each step of a call scores in float64."""
    counts, rescan = [], cpu._rescan

    def counted(queries, codes, group, k):
        counts.append(len(group))
        return rescan(queries, codes, group, k)

    monkeypatch.setattr(cpu, "_rescan", counted)
    return counts


@pytest.mark.parametrize("distinct", [1, 5, 64])
@pytest.mark.parametrize("normalize", [True, False])
def test_dead_codes_are_not_searched_one_by_one(distinct: int, normalize: bool, searched):
    """If a codebook mostly repeats few codes, only their first k are searched, in index order."""
    z, codebook = random(100, 12), random(distinct, 12, seed=1)
    codebook = codebook[torch.arange(3000).mul_(7919) % distinct]
    for k in (1, 2, 8):
        searched.clear()
        code = cpu.nearest_code(z, codebook, k=k, normalize=normalize)
        assert sum(searched) <= 100 * -(-distinct * k // 32)
        ordered = truth(z, codebook, normalize).sort(dim=1, descending=True, stable=True)
        assert torch.equal(code.reshape(100, k), ordered.indices[:, :k])


def test_dead_codes_of_several_blocks_and_broken_ones(monkeypatch):
    monkeypatch.setattr(cpu, "_CODES", 128)
    monkeypatch.setattr(cpu, "_ROWS", 16)
    codebook = random(3, 12, seed=1)[torch.arange(1000) % 3]
    codebook[500] = random(12, seed=2)
    check(random(40, 12), codebook, k=8)
    codebook[[300, 700]] = float("nan")
    code, score = cpu.nearest_code(random(40, 12), codebook, k=3, return_score=True)
    assert code.tolist() == [[300, 0, 1]] * 40 and bool(score.isnan().all())


@pytest.mark.parametrize("spread", [0.1, 0.03])
def test_64_clusters_need_no_more_rescans_than_one(spread: float, searched):
    counts = []
    for codebook in (random(16384, 12, seed=1), None):
        if codebook is None:
            codebook = random(64, 12, seed=3)[torch.arange(16384) % 64]
            codebook += spread * random(16384, 12, seed=4)
        searched.clear()
        check(codebook[::200] + spread * random(82, 12, seed=5), codebook, k=2)
        counts.append(sum(searched))
    assert counts[1] <= 1.1 * counts[0]


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_far_from_the_origin_no_more_is_searched(offset: float, searched):
    """The screen is centred among the codes, though the returned scores are from the origin."""
    z, codebook = random(200, 12).double() + offset, random(2000, 12, seed=1).double() + offset
    for k in (1, 3):
        searched.clear()
        code = cpu.nearest_code(z, codebook, k=k, normalize=False).view(200, k)
        assert sum(searched) <= 200 * (k + 1)
        # Float64 resolution of scores as large as offset squared.
        near = torch.cdist(z - offset, codebook - offset).square() / 2
        slack = 2.0**-52 * 12 * (offset + 5) ** 2 * 14
        best = near.sort(dim=1).values[:, :k]
        assert bool((near.gather(1, code) <= best + 2 * slack).all())
        if offset < 1e6:
            assert torch.equal(code, near.argsort(dim=1)[:, :k])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_dtypes_are_exact_with_respect_to_the_input(dtype: torch.dtype, normalize: bool):
    check(random(200, 12).to(dtype), random(500, 12, seed=1).to(dtype), normalize, k=4)


@pytest.mark.parametrize("normalize", [True, False])
def test_float64_arguments_stay_as_they_are(normalize: bool):
    """Values that are not finite are cleared in copies only, and still show in the result."""
    z, codebook = random(3, 4).double(), random(8, 4, seed=1).double()
    z[1, 2], codebook[5, 0] = float("nan"), float("inf")
    before = z.clone(), codebook.clone()
    code, score = cpu.nearest_code(z, codebook, normalize=normalize, return_score=True)
    assert code.tolist() == [5, 0, 5] and bool(score.isnan().all())
    for now, then in zip((z, codebook), before, strict=True):
        assert torch.equal(now.nan_to_num(), then.nan_to_num())
    x = random(3, 4).double().requires_grad_()
    y = x * 2
    loss = y.square().sum()
    cpu.nearest_code(y, random(8, 4).double(), normalize=normalize)
    loss.backward()
    wide = random(1, 4).double().expand(3, 4)
    assert cpu.nearest_code(wide, wide, normalize=normalize).tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [1e160, 1e-200])
def test_float64_distances_that_overflow_give_codes_that_exist(size: float):
    z, codebook = random(5, 4).double(), random(50, 4, seed=1).double()
    code = cpu.nearest_code(size * z, size * codebook, k=2, normalize=False)
    assert 0 <= int(code.min()) and int(code.max()) < 50
    spoilt = codebook.clone()
    spoilt[7] = 1e200
    want = cpu.nearest_code(z, torch.cat([codebook[:7], codebook[8:]]), normalize=False)
    got = cpu.nearest_code(z, spoilt, normalize=False)
    assert torch.equal(got, want + (want >= 7))


def test_repeats_that_alternate_with_others_of_the_same_sum():
    """Sorting keeps equal keys in codebook order, so neighbours need not be equal."""
    codebook = torch.tensor([[1e20, 1.0], [1e20, 2.0]]).repeat(2000, 1)
    for k in (1, 2, 3, 8):
        code = cpu.nearest_code(torch.tensor([[0.0, 1.0]]), codebook, k=k)
        assert code.flatten().tolist() == [1 + 2 * i for i in range(k)]


def test_non_contiguous_input():
    check(random(12, 200).T, random(500, 24, seed=1)[:, ::2])


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e18])
def test_any_length_of_rows(scale: float):
    check(scale * random(100, 12), random(500, 12, seed=1) / scale)


@given(
    n=st.integers(0, 40), k=st.integers(1, 200), d=st.integers(1, 64), seed=st.integers(0, 2**31),
    levels=st.integers(1, 4), normalize=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_coarse_values_tie_often(n: int, k: int, d: int, seed: int, levels: int, normalize: bool):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randint(-levels, levels + 1, (n, d), generator=draw).float()
    codebook = torch.randint(-levels, levels + 1, (k, d), generator=draw).float()
    code = cpu.nearest_code(z, codebook, normalize=normalize)
    assert code.shape == (n,)
    if n:
        scores = truth(z, codebook, normalize)
        best = scores.amax(1)
        # Scaled copies differ by float64 roundings, which do not count.
        assert bool((scores.gather(1, code[:, None])[:, 0] >= best - 1e-13).all())


def test_empty():
    code, score = cpu.nearest_code(random(0, 12), random(5, 12), return_score=True)
    assert code.shape == score.shape == (0,) and code.dtype == torch.int64


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("k", [1, 3])
def test_a_broken_query_gets_the_first_codes_and_disturbs_no_other(value, normalize: bool, k: int):
    z, codebook = random(100, 12), random(500, 12, seed=1)
    ordered = truth(z, codebook, normalize).sort(dim=1, descending=True, stable=True)
    expected = ordered.indices[:, :k]
    z[::9, 3] = value
    expected[::9] = torch.arange(k)
    code, score = cpu.nearest_code(z, codebook, k=k, normalize=normalize, return_score=True)
    assert torch.equal(code.view(100, k), expected)
    assert torch.equal(score.view(100, k).isnan(), ~z.isfinite().all(1, keepdim=True).expand(-1, k))


def test_a_zero_query_gets_code_0_and_score_0():
    z = random(50, 12)
    z[7] = 0
    code, score = cpu.nearest_code(z, random(500, 12, seed=1), return_score=True)
    assert (code[7], score[7]) == (0, 0)
    code, score = cpu.nearest_code(z, random(500, 12, seed=1), k=3, return_score=True)
    assert code[7].tolist() == [0, 1, 2] and score[7].tolist() == [0, 0, 0]
    # Without `normalize` zero is a point like any other: the shortest code is nearest.
    check(z, random(500, 12, seed=1), normalize=False)


def test_zero_codes_are_codes_like_any_other():
    codebook = random(10, 12, seed=1)
    codebook[4] = 0
    check(torch.cat([random(50, 12), -codebook.sum(0, keepdim=True)]), codebook, k=5)


@pytest.mark.parametrize("where", [0, 3, 499])
def test_a_broken_code_shows(where: int):
    """As in the reference, NaN wins every maximum."""
    codebook = random(500, 12, seed=1)
    codebook[where:, 5] = float("nan")
    z = random(20, 12)
    for search in (cpu.nearest_code, ops.nearest_code):
        code, score = search(z, codebook, return_score=True)
        assert bool((code == where).all()) and bool(score.isnan().all())
        code, score = search(z, codebook, k=3, return_score=True)
        others = [i for i in (0, 1, 2) if i != where][:2]
        assert code.tolist() == [[where, *others]] * 20 and bool(score.isnan().all())


@pytest.mark.parametrize("k", [1, 2])
def test_a_bound_that_is_too_small_is_seen(k: int, monkeypatch):
    """Without the certificate the other tests fail, so they prove something."""
    monkeypatch.setattr(cpu, "_screen_error", lambda dim: 0.0)
    codebook = F.normalize(random(6000, 12, seed=1), dim=1)
    for copy in (slice(2000, 4000), slice(4000, 6000)):
        codebook[copy] = codebook[:2000] * (1 + 1e-7 * random(2000, 12, seed=copy.start))
    z = codebook[:500]
    ordered = truth(z, codebook).sort(dim=1, descending=True, stable=True).indices
    code = cpu.nearest_code(z, codebook, k=k).view(500, k)
    assert bool((code[:, -1] != ordered[:, k - 1]).any())


def test_reduced_float32_products_do_not_reach_the_screen():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        assert cpu._screen_dtype(torch.device("cpu")) == torch.float64
        test_near_ties(1e-6)
    finally:
        setting.fp32_precision = before


def test_autocast_does_not_reach_it():
    z, codebook = random(300, 12), random(3000, 12, seed=1)
    expected = truth(z, codebook).max(1).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cpu.nearest_code(z, codebook), expected)
        # Dispatch disables autocast for the reference too, which has no certificate but no near
        # ties here.
        assert torch.equal(ops.nearest_code(z, codebook), expected)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_opcheck(needs_grad: bool):
    z = random(12, 20).T.requires_grad_(needs_grad)
    torch.library.opcheck(OP, (z, random(300, 12, seed=1), 1, True))
    torch.library.opcheck(OP, (z.detach().half(), random(300, 12, seed=1).half(), 2, False))


@pytest.mark.parametrize("k", [1, 3])
def test_shapes_without_values(k: int):
    z, codebook = (torch.empty(n, 12, dtype=torch.float16, device="meta") for n in (7, 30))
    code, score = cpu.nearest_code(z, codebook, k=k, return_score=True)
    assert code.shape == score.shape == ((7,) if k == 1 else (7, k))
    assert code.dtype == torch.int64 and score.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
def test_torch_compile_takes_it_without_a_graph_break(k: int):
    z, codebook = random(50, 12), random(300, 12, seed=1)
    # One case uses a real compiler, to which the op is opaque.
    compiled = torch.compile(
        lambda z, e: ops.nearest_code(z * 2, e, k=k) + 1,
        backend="inductor" if k == 1 else "aot_eager",
        fullgraph=True,
    )
    expected = truth(z, codebook).topk(k).indices + 1
    expected = expected[:, 0] if k == 1 else expected
    with vfmtok_fast.enable("nearest_code", strict=True):
        assert torch.equal(compiled(z, codebook), expected)
        assert "cpu (compiled)" in vfmtok_fast.status().ops["nearest_code"].calls
    assert torch.equal(compiled(z, codebook), expected)


MEMORY = """
import sys, torch
from vfmtok_fast.cpu.nearest_code import nearest_code

def peak():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

n, k, d, same = map(int, sys.argv[1:])
z, codebook = torch.randn(n, d), torch.randn(k, d)
if same:
    codebook[:] = codebook[0]
nearest_code(z[:70], codebook[:70])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
nearest_code(z, codebook)
print(peak() - before - n * 12)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("n", "k", "d", "same"),
    [(300_000, 64, 12, 0), (10, 1_000_000, 12, 0), (2500, 20_000, 64, 0), (2048, 2048, 64, 1)],
    ids=["many queries", "many codes", "both", "all codes equal"],
)
def test_extra_memory_is_at_most_64_mb(n: int, k: int, d: int, same: int):
    """The limit is for the whole process, the matrix library included; N*12 is the result.

    malloc keeps freed blocks for later use, and how many varies between runs (25 to 73 MB were seen
    for one case). If it maps every block separately, the peak is the memory in use, to 0.3 MB.
    """
    command = [sys.executable, "-P", "-c", MEMORY, *map(str, (n, k, d, same))]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) <= 64 * 2**20
