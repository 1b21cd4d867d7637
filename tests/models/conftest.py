"""What the models' tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vfmtok_fast import GPT, BackboneConfig, VFMTokConfig


def _guided_logits(
    model: GPT, codes: Tensor, classes: Tensor, scale: float, interval: int
) -> Tensor:
    """Teacher-forced logits as `generate` mixes them at every step."""
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


@pytest.fixture(scope="session")
def tiny() -> VFMTokConfig:
    """The smallest tokenizer that has every part; images keep their 336 x 336."""
    return VFMTokConfig(
        dim=32,
        encoder_depth=1,
        decoder_depth=1,
        num_heads=2,
        decoder_mlp_dim=48,
        codebook_size=64,
        pixel_channels=32,
        pixel_channel_mult=(1, 1, 1, 1, 2),
        backbone=BackboneConfig(dim=32, depth=2, num_heads=2, levels=(0, 1)),
    )
