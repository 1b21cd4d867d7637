"""Estimate the cost of a training step, using tensors that have shapes but no values."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .. import switch
from ..generator import GPT, GPTConfig
from ..tf32 import computing
from ..tokenizer import VFMTok, VFMTokConfig
from .gpt import GPTTrainer
from .losses import LPIPS
from .settings import GPTTraining, TokenizerTraining, Training
from .tokenizer import TokenizerTrainer


@dataclass(frozen=True)
class Estimate:
    """Cost of a run.

    Attributes:
        flops: FLOPs of a step per image, forward and backward, with the discriminator active.
            Counts each multiplication and each addition in matrix products, convolutions and
            attention.
        learned, frozen: number of parameters, over all models.
        resting_bytes: bytes of weights, gradients, averaged weights and Adam's moments, in float32.
            The memory of a batch comes on top.
    """

    flops: int
    learned: int
    frozen: int
    resting_bytes: int


def estimate_tokenizer(
    config: VFMTokConfig, settings: TokenizerTraining, discriminator: type[nn.Module] | None
) -> Estimate:
    """Estimate a step of models with these shapes, without allocating the models."""
    with torch.device("meta"):
        model = VFMTok(config)
        lpips = LPIPS() if settings.perceptual_weight > 0 else None
        judge = None if discriminator is None else discriminator()
    if hasattr(judge, "crop"):
        judge.crop = 0  # random draws need values
    parts = [part for part in (model, lpips, judge) if part is not None]
    settings, size = _plain(settings), config.image_size
    number = settings.discriminator_start + 1

    def step() -> None:
        trainer = TokenizerTrainer(model, settings, lpips=lpips, discriminator=judge)
        images = torch.empty(1, 3, size, size)
        made = trainer._learn(images, number, 1.0, {}, [])
        if judge is not None:
            trainer._judge(images, made, number, 1.0, {})

    return _count(parts, model, step)


def estimate_gpt(config: GPTConfig, settings: GPTTraining) -> Estimate:
    """Estimate a step of a generator with this shape, without allocating it."""
    with torch.device("meta"):
        model = GPT(config)

    def step() -> None:
        trainer = GPTTrainer(model, _plain(settings))
        codes = torch.zeros(1, config.block_size, dtype=torch.int64)
        hidden = model.hidden(model.embed(codes[:, 0], codes[:, :-1]))
        # The loss op would count as nothing: its kernel is not one of torch's.
        trainer.learner.backward(model.head(hidden).sum())

    return _count([model], model, step)


def _plain(settings: Training) -> Training:
    """Return the settings without what the FLOP counter cannot handle."""
    return dataclasses.replace(
        settings, precision="float32", micro_batch=None, grad_checkpointing=False, compile=False
    )


def _count(parts: list[nn.Module], model: nn.Module, step: Callable[[], None]) -> Estimate:
    """Count ``step`` on one image; ``parts`` are all models, and ``model`` is averaged."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for part in parts:
        with fake:
            part.to_empty(device="cpu")
    # torch does not count fused attention on a CPU, but counts it as two products.
    with warnings.catch_warnings(), switch.enable([]), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore", UserWarning)  # copying asks fake tensors for their memory
        with fake, FlopCounterMode(display=False) as counter:
            step()
    weights = [weight for part in parts for weight in part.parameters()]
    learned = sum(weight.numel() for weight in weights if weight.requires_grad)
    frozen = sum(weight.numel() for weight in weights) - learned
    averaged = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    # For each learned weight: itself, its gradient and Adam's two moments.
    resting = 4 * (frozen + 4 * learned + averaged)
    return Estimate(counter.get_total_flops(), learned, frozen, resting)


def product_rate(device: torch.device, precision: str) -> float:
    """Measure the FLOP/s that a matrix product reaches on a device: the best of a few runs."""
    size = 8192 if device.type == "cuda" else 1024
    half = precision in ("float16", "bfloat16")
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    best = float("inf")
    with computing(device, tf32=precision != "float32"):
        for _ in range(5):
            start = time.perf_counter()
            float((a @ a)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
