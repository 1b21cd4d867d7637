"""A tiny tokenizer, photos, and a stand-in for Inception that takes no time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small import TINY, write_photos
from torch import Tensor

from vfmtok_fast import VFMTok, evaluation


class SmallInception:
    """Means over a grid of 2 x 2 as pool, a random mixture of them as spatial features."""

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
    """Commands take the stand-in."""
    monkeypatch.setattr(evaluation, "Inception", SmallInception)


@pytest.fixture(scope="session")
def tokenizer() -> VFMTok:
    """The smallest tokenizer that has every part, for pictures of 64 x 64, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = VFMTok(TINY).eval()
        # The norms of the two passes start alike.
        torch.nn.init.normal_(model.token_decoder.feature_norm.weight)
    return model


@pytest.fixture(scope="session")
def model(tokenizer: VFMTok, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, red and blue, with 5 pictures each, no two alike, wider than high."""
    root = tmp_path_factory.mktemp("photos")
    write_photos(root, coloured=True)
    return root


@pytest.fixture(scope="session")
def pictures() -> np.ndarray:
    """uint8 [24, 32, 32, 3], no two alike."""
    return np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
