"""Small models and images used by more than one folder of tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vfmtok_fast import BackboneConfig, VFMTokConfig

# The smallest tokenizer that has every part, for images of 64 x 64.
TINY = VFMTokConfig(
    image_size=64, grid=4, num_regions=16,
    dim=32, encoder_depth=2, decoder_depth=2, num_heads=2, decoder_mlp_dim=48,
    codebook_size=256, pixel_channels=32, pixel_channel_mult=(1, 1, 1, 1, 2),
    backbone=BackboneConfig(dim=32, depth=2, num_heads=2, levels=(0, 1)),
)  # fmt: skip


def write_photos(root: Path, coloured: bool = False) -> None:
    """Write two classes of 5 images, all different, wider than high; red and blue if coloured."""
    for number in range(10):
        draw = np.random.default_rng(number)
        coarse = draw.integers(0, 100 if coloured else 256, (7, 9, 3), dtype=np.uint8)
        if coloured:
            coarse[..., 2 * (number % 2)] += 150
        path = root / f"class{number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(coarse).resize((90 + number, 70), Image.Resampling.BICUBIC).save(path)
