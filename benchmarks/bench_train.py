"""A step of tokenizer and generator training, with all losses and random weights of real shapes.

On a GPU: the full size, half precision and an active discriminator as in the authors' training. On
a CPU: a small model with PatchGAN and without LPIPS, whose two TFLOP per image would take minutes.
"""

from __future__ import annotations

import functools
import math

import harness
import pytest
import torch
from harness import DEVICE, GPU
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import GPT, GPTConfig, VFMTok
from vfmtok_fast.tokenizer.quantizer import entropy_loss
from vfmtok_fast.training import (
    LPIPS,
    DinoDiscriminator,
    GPTTrainer,
    GPTTraining,
    PatchDiscriminator,
    TokenizerTrainer,
    TokenizerTraining,
)
from vfmtok_fast.training.estimate import estimate_gpt, estimate_tokenizer
from vfmtok_fast.untrained import GPTS, TOKENIZERS

# With a batch of 32, the reference would keep 55 GiB for its backward pass, and more (counted).
SIZE, BATCH, PRECISION = ("full", 24, "bfloat16") if GPU else ("small", 2, "float32")
SETTINGS = TokenizerTraining(
    precision=PRECISION, discriminator_start=1, perceptual_weight=1.0 if GPU else 0.0
)
JUDGE = DinoDiscriminator if GPU else PatchDiscriminator
PROVIDERS = ("reference", "fast", "release")
# Losses of the reference's first step, which the fast ones must match up to rounding.
REFERENCE: dict[str, float] = {}
COMPARED = ("rec", "semantic", "codebook", "total", "grad_norm")


def compared(first: dict[str, float], expected: dict[str, float | None]) -> dict[str, float]:
    """Compare a first step with the reference's, if that has run.

    In bfloat16 the gradient norm may differ by more, because nearly tied codes differ; the
    difference is recorded.
    """
    if None in expected.values():
        return {}
    wrong = 2e-2 if PRECISION == "bfloat16" else 1e-4
    for name, value in expected.items():
        wide = 10 if name == "grad_norm" and PRECISION == "bfloat16" else 1
        assert first[name] == pytest.approx(value, rel=wide * wrong), name
    off = abs(first["grad_norm"] / expected["grad_norm"] - 1)
    return {"losses_as_reference": wrong, "grad_norm_off": round(off, 6)}


@functools.cache
def images() -> Tensor:
    coarse = torch.rand(BATCH, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=336, mode="bilinear").to(DEVICE)


class ReleaseTrainer(TokenizerTrainer):
    """A trainer with the extra work of the authors' trainer, whose results are discarded.

    The extra work is the entropy term of weight 0 with its gradient, averaging the frozen backbone
    too, counting the codes, and waiting for the device. Nothing is enabled.
    """

    def __init__(self, model: VFMTok, *arguments, **settings) -> None:
        super().__init__(model, *arguments, **settings)
        self.frozen = list(model.backbone.parameters())
        self.frozen_average = [weight.clone() for weight in self.frozen]

    def step(self, images: Tensor) -> dict[str, float]:
        terms = super().step(images)
        with torch.no_grad():
            torch._foreach_mul_(self.frozen_average, self.settings.ema)
            torch._foreach_add_(self.frozen_average, self.frozen, alpha=1 - self.settings.ema)
        if GPU:
            torch.cuda.synchronize()
        return terms

    def _use_codes(self, found: list, images: int) -> dict[str, float]:
        for codes, queries in found:
            len(codes.unique())
            rows = self.model.quantizer.codebook.detach().requires_grad_()
            entropy_loss(queries.clone().requires_grad_()[None], rows).backward()
        return super()._use_codes(found, images)


def trainer(kind: type[TokenizerTrainer]) -> TokenizerTrainer:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = VFMTok(TOKENIZERS[SIZE])
    return kind(model, SETTINGS, lpips=LPIPS() if GPU else None, discriminator=JUDGE())


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_step(benchmark, provider: str):
    with vfmtok_fast.enable(None if provider == "fast" else []):
        made = trainer(ReleaseTrainer if provider == "release" else TokenizerTrainer)
        first = made.step(images())

        def check(terms: dict[str, float]) -> dict[str, object]:
            if provider == "reference":
                REFERENCE.update(first)
            assert terms["total"] > 0
            said = compared(first, {name: REFERENCE.get(name) for name in COMPARED})
            return {"images": BATCH, "precision": PRECISION, **said}

        flops = estimate_tokenizer(made.model.config, SETTINGS, JUDGE).flops
        harness.measure(
            benchmark, op="train", provider=provider, fn=lambda: made.step(images()), check=check,
            work=harness.Work(bytes=images().nbytes, flops=BATCH * flops),
            shape=f"tokenizer step, {SIZE} size B={BATCH} {PRECISION}",
            rounds=10 if GPU else 3, replay=False,
        )  # fmt: skip
    record = harness.session.records[-1]
    record["images_s"] = round(1e6 * BATCH / record["median_us"], 2)


GPT_NAME, CODES = ("GPT-L", 64) if GPU else ("small", 4)


@pytest.mark.parametrize("provider", ["reference", "fast"])
def bench_gpt_step(benchmark, provider: str):
    config = GPTConfig.preset(GPT_NAME) if GPU else GPTS[GPT_NAME]
    settings = GPTTraining(precision=PRECISION)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(config.vocab_size, (CODES, config.block_size), generator=generator)
    given = codes.to(DEVICE), (torch.arange(CODES) % config.num_classes).to(DEVICE)
    with vfmtok_fast.enable(None if provider == "fast" else []):
        torch.manual_seed(0)
        made = GPTTrainer(GPT(config).to(DEVICE), settings)
        first = made.step(*given)

        def check(terms: dict[str, float]) -> dict[str, object]:
            # At first all codes are equally likely; the norm is the first value with rounding.
            assert first["loss"] == pytest.approx(math.log(config.vocab_size), rel=1e-3)
            if provider == "reference":
                REFERENCE["gpt"] = first["grad_norm"]
            assert terms["loss"] < first["loss"]
            said = compared(first, {"grad_norm": REFERENCE.get("gpt")})
            return {"images": CODES, "precision": PRECISION, **said}

        harness.measure(
            benchmark, op="train", provider=provider, fn=lambda: made.step(*given), check=check,
            work=harness.Work(
                bytes=codes.nbytes, flops=CODES * estimate_gpt(config, settings).flops
            ),
            shape=f"{GPT_NAME} step, B={CODES} {PRECISION}",
            rounds=10 if GPU else 3, replay=False,
        )  # fmt: skip
    record = harness.session.records[-1]
    record["images_s"] = round(1e6 * CODES / record["median_us"], 2)
