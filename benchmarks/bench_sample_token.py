"""`ops.sample_token` against its reference: one guided code per image of the codebook's size."""

from __future__ import annotations

import functools
from collections.abc import Callable

import harness
import pytest
import torch
from harness import DEVICE, GPU
from torch import Tensor

from vfmtok_fast import ops

V = 16384
BATCHES = (1, 64, 1024) if GPU else (1, 64)
SETTINGS: dict[str, dict[str, object]] = {
    "plain": {},
    "top-k 1000": {"top_k": 1000},
    "top-p 0.9": {"top_p": 0.9},
}
if GPU:  # Both searches in one launch.
    SETTINGS["top-k 1000, top-p 0.9"] = {"top_k": 1000, "top_p": 0.9}
STEP = 100


@functools.lru_cache(maxsize=1)
def inputs(B: int) -> tuple[Tensor, Tensor]:
    """Logits of conditional and unconditional rows, as a model gives them, and image ids."""
    logits = 2 * torch.randn(2 * B, V, generator=torch.Generator().manual_seed(0))
    return logits.to(DEVICE), torch.arange(B, device=DEVICE)


def sample(logits: Tensor, image_ids: Tensor, settings: dict[str, object]) -> Tensor:
    B = len(image_ids)
    return ops.sample_token(
        logits[:B], image_ids, STEP, uncond_logits=logits[B:], cfg_scale=1.5, **settings
    )


@functools.lru_cache(maxsize=1)
def expected(B: int, name: str) -> Tensor:
    return sample(*inputs(B), SETTINGS[name])


@functools.cache
def compiled() -> Callable:
    return torch.compile(sample, dynamic=False)


PROVIDERS: dict[str, Callable[[], Callable]] = {
    "reference": lambda: sample,
    "reference compiled": compiled,
    "fast": lambda: sample,
}


def measure(
    benchmark, op: str, provider: str, call: Callable[..., Tensor], B: int, name: str, fast: bool
) -> None:
    logits, image_ids = inputs(B)

    def check(codes: Tensor) -> dict[str, object]:
        # Codes tied within rounding may differ: about one row in 10^5.
        wrong = int((codes != expected(B, name)).sum())
        assert wrong <= B // 32, f"{wrong} of {B} codes are not the reference's"
        return {"batch": B, "v": V, "wrong_rows": wrong}

    harness.measure(
        benchmark,
        op=op,
        shape=f"B={B} {name}",
        provider=provider,
        fn=lambda: call(logits, image_ids, SETTINGS[name]),
        check=check,
        # Guidance and the sum with the noise; the noise itself is integers and logarithms.
        work=harness.Work(bytes=2 * B * V * 4 + 16 * B, flops=4 * B * V),
        enabled="sample_token" if fast else None,
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("B", BATCHES)
def bench_sample_token(benchmark, B: int, name: str, provider: str):
    call = PROVIDERS[provider]()
    measure(benchmark, "sample_token", provider, call, B, name, fast=provider == "fast")


@pytest.mark.skipif(not GPU, reason="the launch settings are a GPU's")
@pytest.mark.parametrize("B", [1, 1024])
@pytest.mark.parametrize(
    ("chunk", "warps"), [(2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16), (8192, 32)]
)
def bench_settings(benchmark, monkeypatch, chunk: int, warps: int, B: int):
    """Tuning of the draw: what stands in the kernel's file should be the fastest of these."""
    from vfmtok_fast.kernels import sample_token as kernel

    monkeypatch.setattr(kernel, "CHUNK", chunk)
    monkeypatch.setattr(kernel, "CODES_PER_WARP", chunk // warps)
    provider = f"chunk={chunk} warps={warps}"
    measure(benchmark, "sample_token_settings", provider, sample, B, "plain", fast=True)
