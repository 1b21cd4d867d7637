"""Models with seeded random weights, for demos and tests: they show the mechanics, not quality."""

from __future__ import annotations

import torch

from .generator import GPT, GPTConfig
from .tokenizer import BackboneConfig, VFMTok, VFMTokConfig

# Every part of the real models, at a size that a laptop runs in moments.
TOKENIZERS = {
    "small": VFMTokConfig(
        dim=128,
        encoder_depth=2,
        decoder_depth=2,
        decoder_mlp_dim=256,
        codebook_size=1024,
        pixel_channels=32,
        backbone=BackboneConfig(dim=96, depth=4, num_heads=4, levels=(0, 1, 2, 3)),
    ),
    "full": VFMTokConfig(),
}
GPTS = {
    "small": GPTConfig(num_layers=3, num_heads=4, dim=128, vocab_size=1024, num_classes=10),
    "full": GPTConfig.preset("GPT-B"),
}


def untrained_tokenizer(name: str, seed: int = 0) -> VFMTok:
    """Return one of `TOKENIZERS` in eval mode; ``seed`` alone determines its random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VFMTok(TOKENIZERS[name]).eval()
        # At initialisation, every region would look along the same star whatever the image.
        for layer in model.region_encoder.layers:
            torch.nn.init.normal_(layer.cross_attention.offsets.weight, std=0.1)
            torch.nn.init.normal_(layer.cross_attention.weights.weight, std=0.1)
    return model


def untrained_gpt(name: str, seed: int = 0) -> GPT:
    """Return one of `GPTS` in eval mode; ``seed`` alone determines its random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(GPTS[name]).eval()
        # Zero, the value at the start of training, would make all codes equally likely for any
        # class.
        torch.nn.init.normal_(model.head.weight, std=0.5)
    return model
