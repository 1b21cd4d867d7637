"""Fixtures for the training tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small import TINY, write_photos
from torch import Tensor, nn

from vfmtok_fast import BackboneConfig, VFMTok, VFMTokConfig
from vfmtok_fast.images import to_float
from vfmtok_fast.training import PatchDiscriminator, TokenizerTrainer, TokenizerTraining


@pytest.fixture(scope="session")
def tiny() -> VFMTokConfig:
    """The smallest tokenizer that has every part, for images of 64 x 64."""
    return TINY


@pytest.fixture(scope="session")
def golden_tokenizer(official_weights) -> Callable[[], VFMTok]:
    """``golden_tokenizer()``: a new model with the weights of `train_tokenizer_small`."""
    config = VFMTokConfig(
        dim=128, encoder_depth=2, decoder_depth=2, decoder_mlp_dim=256, codebook_size=1024,
        pixel_channels=32, backbone=BackboneConfig(dim=96, depth=24, num_heads=4),
    )  # fmt: skip
    other = ("perceptual_loss.", "discriminator.")
    weights = official_weights("train_tokenizer_small").items()
    weights = {key: value for key, value in weights if not key.startswith(other)}
    return lambda: VFMTok.from_official(weights, config=config)


@pytest.fixture(scope="session")
def golden_images(golden) -> Tensor:
    """The two images of the training goldens, [2, 3, 336, 336] in [-1, 1]."""
    return to_float(golden("tokenizer_small")["images"])


@pytest.fixture(scope="session")
def reconstructed(golden_tokenizer, golden_images: Tensor) -> tuple[Tensor, Tensor]:
    """The golden images, and the unclamped reconstruction of the first in eval mode."""
    model = golden_tokenizer()
    return golden_images, model.decode(model.encode(golden_images[:1]))


@pytest.fixture(scope="session")
def dino_weights(official_weights) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The golden DINO ViT-S/16 and the golden heads, under the names that their files use."""
    weights = official_weights("train_tokenizer_small")
    vit, heads = "discriminator.dino_proxy.0.", "discriminator."
    return (
        {k.removeprefix(vit): v for k, v in weights.items() if k.startswith(vit)},
        {k.removeprefix(heads): v for k, v in weights.items() if k.startswith(f"{heads}heads.")},
    )


@pytest.fixture(scope="session")
def lpips_weights(official_weights) -> dict[str, Tensor]:
    """The golden VGG16 and linear layers: the recipe's, with two kinds changed (golden README)."""
    found = {}
    for key, value in official_weights("train_tokenizer_small").items():
        if key.startswith("perceptual_loss."):
            if ".net." in key and key.endswith("weight"):
                value = 1.5 * value
            found[key.removeprefix("perceptual_loss.")] = value.abs() if ".lin" in key else value
    return found


class Distance(nn.Module):
    """A stand-in for LPIPS, which takes longer than everything else here."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x - y).abs().mean(dim=(1, 2, 3))


@pytest.fixture(scope="session")
def make(tiny: VFMTokConfig) -> Callable[..., TokenizerTrainer]:
    """``make(judge, dropout, device, **settings)``: a new trainer, from the same weights."""

    def make(
        judge: bool = True, dropout: float = 0.0, device: str = "cpu", **settings
    ) -> TokenizerTrainer:
        config = dataclasses.replace(tiny, decoder_dropout=dropout)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model, patch = VFMTok(config), PatchDiscriminator(width=8)
        settings = {"discriminator_start": 1, **settings}
        return TokenizerTrainer(
            model.to(device), TokenizerTraining(**settings), lpips=Distance(),
            discriminator=patch if judge else None,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 7, 7, generator=generator) * 2 - 1
    return nn.functional.interpolate(coarse, size=64, mode="bilinear")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes with 5 images each, all different and wider than high."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root)
    return root
