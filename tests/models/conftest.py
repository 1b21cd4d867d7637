"""Shared by the tests of models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vfmtok_fast import GPT, BackboneConfig, VFMTokConfig
from vfmtok_fast.generator import Sampling


def _guided_logits(
    model: GPT, codes: Tensor, classes: Tensor, scale: float, interval: int
) -> Tensor:
    """Return teacher-forced logits, mixed as `generate` mixes them at every step."""
    with torch.no_grad():
        conditional = model(codes, classes)
        none = torch.full_like(classes, model.config.num_classes)
        unconditional = model.predict(model.embed(none, codes[:, :-1].long()))
    mixed = unconditional + scale * (conditional - unconditional)
    step = torch.arange(codes.shape[1])[:, None]
    return torch.where((interval > -1) & (step > interval + 1), conditional, mixed)


@pytest.fixture(scope="session")
def guided_logits() -> Callable[..., Tensor]:
    """``guided_logits(gpt, codes, classes, scale, interval)``, an oracle without `generate`."""
    return _guided_logits


@torch.no_grad()
def _uncached(model: GPT, classes: Tensor, image_ids: Tensor | None = None, **settings) -> Tensor:
    sampling, B = Sampling(**settings), len(classes)
    ids = torch.arange(B) if image_ids is None else image_ids
    codes = torch.empty(B, 0, dtype=torch.int64)
    scales = sampling.scales(model.config.block_size, model.device)
    for step in range(model.config.block_size):
        rows, before = classes, codes
        if sampling.guided(step):
            rows = torch.cat([classes, torch.full_like(classes, model.config.num_classes)])
            before = codes.repeat(2, 1)
        logits = model.predict(model.embed(rows, before))[:, -1]
        codes = torch.cat([codes, sampling.draw(logits, ids, step, scales)[:, None]], dim=1)
    return codes


@pytest.fixture(scope="session")
def uncached() -> Callable[..., Tensor]:
    """``uncached(gpt, classes, **settings)``: generation that recomputes all positions every time.

    It is the oracle for the cache and the loop. The model must be in eval mode.
    """
    return _uncached


@pytest.fixture(scope="session")
def tiny() -> VFMTokConfig:
    """The smallest tokenizer that has every part; images keep their 336 x 336."""
    return VFMTokConfig(
        dim=32, encoder_depth=1, decoder_depth=1, num_heads=2, decoder_mlp_dim=48,
        codebook_size=64, pixel_channels=32, pixel_channel_mult=(1, 1, 1, 1, 2),
        backbone=BackboneConfig(dim=32, depth=2, num_heads=2, levels=(0, 1)),
    )  # fmt: skip
