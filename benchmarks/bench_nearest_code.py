"""`ops.nearest_code` against its reference and its peers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, GPU

from vfmtok_fast import ops

K = 16384
# Float64 scores closer than this belong to equal codes or scaled copies.
TIE = 1e-13


@dataclass(frozen=True)
class Case:
    """Number of rows, dimension, distribution of codes and rows, and number of codes to return."""

    n: int
    d: int
    codes: str = ""
    k: int = 1

    def __str__(self) -> str:
        asked = f", k={self.k}" * (self.k > 1)
        return f"N={self.n} K={K} d={self.d}{', ' * bool(self.codes)}{self.codes}{asked}"


CLUSTERS = {"64 clusters spread 0.1": 0.1, "64 clusters spread 0.03": 0.03}
HALF, ONE = "half of the codes twice", "one code"
# 256, 1, 32 and 4,096 images of 256 regions. The most important cases come first, because the time
# may run out. On a CPU the reference needs about 10 us per row, so larger cases run on a GPU only.
MANY = 65536 if GPU else 2048
CASES = [Case(n, 12) for n in ((65536, 256, 8192) if GPU else (256, 8192))]
CASES += [Case(MANY, 12, codes) for codes in (*CLUSTERS, HALF, ONE)]
CASES += [Case(MANY, 12, k=2), Case(MANY, 12, "64 clusters spread 0.1", k=2)]
if GPU:
    CASES += [Case(65536, 8), Case(65536, 32), Case(1048576, 12)]
else:
    CASES += [Case(n, d) for d in (8, 32) for n in (256, 8192)]


@functools.lru_cache(maxsize=1)
def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, case.d, generator=generator)

    z, codebook = normal(case.n), normal(K)
    if spread := CLUSTERS.get(case.codes):
        centres = F.normalize(normal(64), dim=1)
        z, codebook = (
            centres[torch.randint(64, (len(x),), generator=generator)] + spread * x
            for x in (z, codebook)
        )
    if case.codes == HALF:
        codebook[K // 2 :] = codebook[: K // 2]
    if case.codes == ONE:
        codebook[:] = codebook[0].clone()
    return z.to(DEVICE), codebook.to(DEVICE)


@functools.lru_cache(maxsize=1)
def best_scores(case: Case) -> torch.Tensor:
    """Return the truth: the k largest float64 cosines of each row, [N, k]."""
    z, codebook = inputs(case)
    wide = F.normalize(codebook.double(), dim=1).T
    return torch.cat(
        [
            (F.normalize(part.double(), dim=1) @ wide).topk(case.k, dim=1)[0]
            for part in z.split(2048)
        ]
    )


def wrong_rows(code: torch.Tensor, case: Case) -> int:
    """Count rows with a code that is not the best, or is returned twice, or is a later copy."""
    z, codebook = inputs(case)
    code = code.view(case.n, case.k)
    chosen = F.normalize(codebook.double(), dim=1)[code]
    score = (F.normalize(z.double(), dim=1)[:, None] * chosen).sum(2)
    wrong = (score < best_scores(case) - TIE).any(1)
    wrong |= (code.sort(dim=1)[0].diff(dim=1) == 0).any(1)
    if case.codes in (HALF, ONE):  # Among equal codes, the first is correct.
        wrong |= code[:, 0] >= (K // 2 if case.codes == HALF else 1)
    return int(wrong.sum())


def search(z: torch.Tensor, codebook: torch.Tensor, k: int) -> torch.Tensor:
    return ops.nearest_code(z, codebook, k=k) if k > 1 else ops.nearest_code(z, codebook)


def cdist(z: torch.Tensor, codebook: torch.Tensor, k: int) -> torch.Tensor:
    distance = torch.cdist(F.normalize(z, dim=1), F.normalize(codebook, dim=1))
    return distance.topk(k, dim=1, largest=False)[1] if k > 1 else distance.argmin(1)


def flash_kmeans(z: torch.Tensor, codebook: torch.Tensor, k: int) -> torch.Tensor:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    z, codebook = F.normalize(z, dim=1)[None], F.normalize(codebook, dim=1)[None]
    return euclid_assign_triton(z, codebook, z.square().sum(-1))[0].long()


@functools.cache
def compiled() -> Callable:
    return torch.compile(search)


PROVIDERS: dict[str, Callable[[], Callable]] = {
    "reference": lambda: search,
    "reference compiled": compiled,
    "fast": lambda: search,
    "torch.cdist": lambda: cdist,
    "flash-kmeans": lambda: flash_kmeans,
}


def needs(provider: str, case: Case) -> str | None:
    """Return why a provider cannot run here, or None."""
    if case.k > 1 and provider != "torch.cdist":
        if provider == "flash-kmeans":
            return "flash-kmeans finds one code"
        if "k" not in inspect.signature(ops.nearest_code).parameters:
            return "the op finds one code"
    if provider == "reference compiled" and case.codes:
        return "how codes lie changes nothing there"
    if provider == "flash-kmeans":
        if not GPU:
            return "flash-kmeans needs a GPU"
        try:
            import flash_kmeans.assign_euclid_triton  # noqa: F401
        except ImportError:
            return "flash-kmeans is not installed (pip install flash-kmeans)"
    if provider != "fast" and GPU:
        free, _ = torch.cuda.mem_get_info()
        if 2.2 * 4 * case.n * K > free and provider != "flash-kmeans":
            return "its N x K matrix does not fit"
    return None


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_nearest_code(benchmark, case: Case, provider: str):
    if reason := needs(provider, case):
        pytest.skip(reason)
    z, codebook = inputs(case)
    call = PROVIDERS[provider]()

    def check(code: torch.Tensor) -> dict[str, object]:
        wrong = wrong_rows(code, case)
        # The fast path guarantees no wrong rows. Others are reported with theirs, which may be all
        # rows where codes nearly tie.
        allowed = 0 if provider == "fast" else case.n if case.codes else case.n // 20
        assert wrong <= allowed, f"{wrong} of {case.n} rows are wrong"
        facts = {"codes": case.codes} if case.codes else {}
        return {"n": case.n, "k": K, "d": case.d, "asked": case.k, "wrong_rows": wrong, **facts}

    n, d = case.n, case.d
    harness.measure(
        benchmark,
        op="nearest_code",
        shape=str(case),
        provider=provider,
        fn=lambda: call(z, codebook, case.k),
        check=check,
        work=harness.Work(bytes=4 * d * (n + K) + 8 * n * case.k, flops=2 * n * K * d),
        enabled="nearest_code" if provider == "fast" else None,
    )
