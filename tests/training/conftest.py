"""What the tests of training share."""

from __future__ import annotations

import pytest

from vfmtok_fast import BackboneConfig, VFMTokConfig


@pytest.fixture(scope="session")
def tiny() -> VFMTokConfig:
    """The smallest tokenizer that has every part, for pictures of 112 x 112."""
    return VFMTokConfig(
        image_size=112, grid=8, num_regions=16,
        dim=32, encoder_depth=2, decoder_depth=2, num_heads=2, decoder_mlp_dim=48,
        codebook_size=256, pixel_channels=32, pixel_channel_mult=(1, 1, 1, 1, 2),
        backbone=BackboneConfig(dim=32, depth=2, num_heads=2, levels=(0, 1)),
    )  # fmt: skip
