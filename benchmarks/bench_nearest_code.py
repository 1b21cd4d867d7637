"""`ops.nearest_code` against its reference and its peers."""

from __future__ import annotations

import functools
from collections.abc import Callable

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, GPU

from vfmtok_fast import ops

K = 16384
# One image, 32, 256 and 4,096 images of 256 regions.
ROWS = (256, 8192, 65536, 1048576)
DIMS = (8, 12, 32)
# A CPU needs about 10 us a row for the reference; larger shapes are a GPU's.
CASES = [(n, d) for d in DIMS for n in ROWS if GPU or n <= 8192]
# Float64 scores closer than this are equal codes or scaled copies.
TIE = 1e-13


@functools.lru_cache(maxsize=1)
def inputs(n: int, d: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    z, codebook = (torch.randn(rows, d, generator=generator) for rows in (n, K))
    return z.to(DEVICE), codebook.to(DEVICE)


@functools.lru_cache(maxsize=1)
def best_scores(n: int, d: int) -> torch.Tensor:
    """The truth: the largest float64 cosine of each row."""
    z, codebook = inputs(n, d)
    wide = F.normalize(codebook.double(), dim=1).T
    return torch.cat([(F.normalize(part.double(), dim=1) @ wide).amax(1) for part in z.split(2048)])


def wrong_rows(code: torch.Tensor, n: int, d: int) -> int:
    z, codebook = inputs(n, d)
    chosen = F.normalize(codebook.double(), dim=1)[code]
    score = (F.normalize(z.double(), dim=1) * chosen).sum(1)
    return int((score < best_scores(n, d) - TIE).sum())


def cdist(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    return torch.cdist(F.normalize(z, dim=1), F.normalize(codebook, dim=1)).argmin(1)


def flash_kmeans(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    z, codebook = F.normalize(z, dim=1)[None], F.normalize(codebook, dim=1)[None]
    return euclid_assign_triton(z, codebook, z.square().sum(-1))[0].long()


@functools.cache
def compiled() -> Callable:
    return torch.compile(ops.nearest_code)


PROVIDERS: dict[str, Callable[[], Callable]] = {
    "reference": lambda: ops.nearest_code,
    "reference compiled": compiled,
    "fast": lambda: ops.nearest_code,
    "torch.cdist": lambda: cdist,
    "flash-kmeans": lambda: flash_kmeans,
}


def needs(provider: str, n: int) -> str | None:
    """Why a provider cannot run here, or None."""
    if provider == "flash-kmeans":
        if not GPU:
            return "flash-kmeans needs a GPU"
        try:
            import flash_kmeans.assign_euclid_triton  # noqa: F401
        except ImportError:
            return "flash-kmeans is not installed"
    if provider != "fast" and GPU:
        free, _ = torch.cuda.mem_get_info()
        if 2.2 * 4 * n * K > free and provider != "flash-kmeans":
            return "its N x K matrix does not fit"
    return None


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("n", "d"), CASES)
def bench_nearest_code(benchmark, n: int, d: int, provider: str):
    if reason := needs(provider, n):
        pytest.skip(reason)
    z, codebook = inputs(n, d)
    search = PROVIDERS[provider]()

    def check(code: torch.Tensor) -> dict[str, object]:
        wrong = wrong_rows(code, n, d)
        # The fast path promises none; others are shown with what they miss.
        assert wrong <= (0 if provider == "fast" else n // 20), f"{wrong} of {n} rows are wrong"
        return {"n": n, "k": K, "d": d, "wrong_rows": wrong}

    harness.measure(
        benchmark,
        op="nearest_code",
        shape=f"N={n} K={K} d={d}",
        provider=provider,
        fn=lambda: search(z, codebook),
        check=check,
        work=harness.Work(bytes=4 * d * (n + K) + 8 * n, flops=2 * n * K * d),
        enabled="nearest_code" if provider == "fast" else None,
    )


@pytest.mark.skipif(not GPU, reason="the launch settings are a GPU's")
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize(("rows", "warps"), [(64, 4), (128, 4), (128, 8), (256, 8)])
def bench_settings(benchmark, monkeypatch, rows: int, warps: int, stages: int):
    """Tuning: what stands in the kernel's file should be the fastest of these."""
    from vfmtok_fast.kernels import nearest_code as kernel

    settings = {"SCREEN_ROWS": rows, "SCREEN_WARPS": warps, "SCREEN_STAGES": stages}
    for name, value in settings.items():
        monkeypatch.setattr(kernel, name, value)
    n, d = 65536, 12
    z, codebook = inputs(n, d)

    def check(code: torch.Tensor) -> dict[str, object]:
        assert wrong_rows(code, n, d) == 0
        return {"n": n, "k": K, "d": d, "wrong_rows": 0}

    harness.measure(
        benchmark,
        op="nearest_code_settings",
        shape=f"N={n} K={K} d={d}",
        provider=f"rows={rows} warps={warps} stages={stages}",
        fn=lambda: kernel.nearest_code(z, codebook),
        check=check,
        work=harness.Work(bytes=4 * d * (n + K) + 8 * n, flops=2 * n * K * d),
    )
