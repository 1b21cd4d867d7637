"""A tokenizer that is quick and exact, and small folders of pictures."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

SIDE, TOKENS, CODEBOOK = 16, 4, 1000


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    """The part of VFMTokConfig that a cache needs, with one more field that only it covers."""

    image_size: int = SIDE
    num_regions: int = TOKENS
    codebook_size: int = CODEBOOK
    levels: tuple[int, ...] = (1, 2)


class FakeTokenizer(torch.nn.Module):
    """Tokens are a hash of the pixels, in integers: every pixel of a picture counts, no other."""

    def __init__(self, config: FakeConfig = FakeConfig(), scale: int = 1) -> None:
        super().__init__()
        self.config = config
        self.scale = torch.nn.Parameter(torch.tensor(float(scale)))
        self.batches: list[int] = []

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        assert images.dtype == torch.float32 and images.shape[1:] == (3, SIDE, SIDE)
        self.batches.append(len(images))
        levels = ((images + 1) * 127.5).round().long().flatten(1)
        weights = torch.arange(levels.shape[1] * TOKENS).reshape(-1, TOKENS) * 7919 % 65521
        return (levels @ weights * int(self.scale)) % self.config.codebook_size


def write_picture(path: Path, seed: int) -> Path:
    """A small PNG of noise, unlike any other seed's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 256, (20 + seed % 7, 20 + seed % 5, 3), dtype=np.uint8)
    Image.fromarray(values).save(path, "PNG")
    return path


def make_tree(root: Path, count: int = 11, bad: tuple[int, ...] = ()) -> Path:
    """`count` pictures in three classes; those numbered in `bad` are broken."""
    for number in range(count):
        path = root / f"class{number % 3}" / f"{number:03d}.png"
        write_picture(path, number)
        if number in bad:
            path.write_bytes(path.read_bytes()[:200])
    return root


def read_tree(out: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def tokenizer() -> FakeTokenizer:
    return FakeTokenizer()


@pytest.fixture(scope="session")
def fake():
    """This module, for tests that need its classes and functions."""
    return sys.modules[__name__]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Eleven good pictures."""
    return make_tree(tmp_path / "pictures")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a cache may go; not there yet."""
    return tmp_path / "tokens"
