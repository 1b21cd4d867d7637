"""Fixtures: a tiny tokenizer, photos, and an instant stand-in for Inception."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small import TINY, write_photos
from torch import Tensor

from vfmtok_fast import VFMTok, evaluation


class SmallInception:
    """Pool features are means over a 2 x 2 grid, spatial ones a random mixture of those."""

    sizes = {"pool": 12, "spatial": 5}

    def __init__(self, weights: object = None, device: object = "cpu"):
        self.device = torch.device("cpu")
        self.described = {"weights": "random weights", "seed": 0}
        self.mix = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))

    def __call__(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        planes = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
        pool = torch.nn.functional.adaptive_avg_pool2d(planes, 2).flatten(1) / 64
        return pool, (pool @ self.mix).relu()

    def logits(self, pool: Tensor) -> Tensor:
        return pool @ self.mix


@pytest.fixture
def inception() -> SmallInception:
    return SmallInception()


@pytest.fixture
def small_inception(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make commands use the stand-in for Inception."""
    monkeypatch.setattr(evaluation, "Inception", SmallInception)


@pytest.fixture(scope="session")
def tokenizer() -> VFMTok:
    """The smallest tokenizer that has every part, for images of 64 x 64, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = VFMTok(TINY).eval()
        # The norms of the two passes start alike; make them differ.
        torch.nn.init.normal_(model.token_decoder.feature_norm.weight)
    return model


@pytest.fixture(scope="session")
def model(tokenizer: VFMTok, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two classes, red and blue, with 5 images each, all different, wider than high."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root, coloured=True)
    return root


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
    """Images, uint8 [24, 32, 32, 3], all different."""
    return np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
