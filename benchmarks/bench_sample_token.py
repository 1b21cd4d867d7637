"""`ops.sample_token` against its reference: one guided code per image, over the full codebook."""

from __future__ import annotations

import functools

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
if GPU:  # The searches of both filters in one launch.
    SETTINGS["top-k 1000, top-p 0.9"] = {"top_k": 1000, "top_p": 0.9}
STEP = 100


@functools.lru_cache(maxsize=1)
def inputs(B: int) -> tuple[Tensor, Tensor]:
    """Return logits of conditional and unconditional rows, as from a model, and image ids."""
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


PROVIDERS = harness.providers(sample)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("B", BATCHES)
def bench_sample_token(benchmark, B: int, name: str, provider: str):
    logits, image_ids = inputs(B)
    call = PROVIDERS[provider]()

    def check(codes: Tensor) -> dict[str, object]:
        # Codes tied within rounding may differ, in about one row in 10^5.
        wrong = int((codes != expected(B, name)).sum())
        assert wrong <= B // 32, f"{wrong} of {B} codes are not the reference's"
        return {"batch": B, "v": V, "wrong_rows": wrong}

    harness.measure(
        benchmark,
        op="sample_token",
        shape=f"B={B} {name}",
        provider=provider,
        fn=lambda: call(logits, image_ids, SETTINGS[name]),
        check=check,
        # Counts guidance and the addition of the noise; the noise is integers and logarithms.
        work=harness.Work(bytes=2 * B * V * 4 + 16 * B, flops=4 * B * V),
        enabled="sample_token" if provider == "fast" else None,
    )
