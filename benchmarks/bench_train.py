"""A step of the tokenizer's training, with all losses; random weights of the real shapes.

On a GPU the full size, half precision and the authors' discriminator at work. On a CPU a small
model with PatchGAN and without LPIPS, whose two TFLOP a picture would take minutes.
"""

from __future__ import annotations

import functools

import harness
import pytest
import torch
from harness import DEVICE, GPU
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import VFMTok
from vfmtok_fast.training import (
    LPIPS,
    DinoDiscriminator,
    PatchDiscriminator,
    TokenizerTrainer,
    TokenizerTraining,
)
from vfmtok_fast.training.estimate import estimate
from vfmtok_fast.untrained import TOKENIZERS

SIZE, BATCH, PRECISION = ("full", 32, "bfloat16") if GPU else ("small", 2, "float32")
SETTINGS = TokenizerTraining(
    precision=PRECISION, discriminator_start=1, perceptual_weight=1.0 if GPU else 0.0
)
JUDGE = DinoDiscriminator if GPU else PatchDiscriminator
PROVIDERS = ("reference", "fast")
# Losses of the reference's first step, which the fast way's must be by rounding.
REFERENCE: dict[str, float] = {}
COMPARED = ("rec", "semantic", "codebook", "total", "grad_norm")


@functools.cache
def images() -> Tensor:
    coarse = torch.rand(BATCH, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=336, mode="bilinear").to(DEVICE)


def trainer() -> TokenizerTrainer:
    torch.manual_seed(0)
    model = VFMTok(TOKENIZERS[SIZE]).to(DEVICE)
    return TokenizerTrainer(
        model, SETTINGS, lpips=LPIPS() if GPU else None, discriminator=JUDGE()
    )  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_step(benchmark, provider: str):
    with vfmtok_fast.enable(None if provider == "fast" else []):
        made = trainer()
        first = made.step(images())

        def check(terms: dict[str, float]) -> dict[str, object]:
            if provider == "reference":
                REFERENCE.update(first)
            wrong = 2e-2 if PRECISION == "bfloat16" else 1e-4
            for name in COMPARED if REFERENCE else ():
                assert first[name] == pytest.approx(REFERENCE[name], rel=wrong), name
            assert terms["total"] > 0
            return {"images": BATCH, "precision": PRECISION, "losses_as_reference": wrong}

        flops = estimate(made.model.config, SETTINGS, JUDGE).flops
        harness.measure(
            benchmark, op="train", provider=provider, fn=lambda: made.step(images()), check=check,
            work=harness.Work(bytes=images().nbytes, flops=BATCH * flops),
            shape=f"tokenizer step, {SIZE} size B={BATCH} {PRECISION}",
            rounds=10 if GPU else 3, replay=False,
        )  # fmt: skip
    record = harness.session.records[-1]
    record["images_s"] = round(1e6 * BATCH / record["median_us"], 2)
