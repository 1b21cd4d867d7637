"""Configuration of the generator, and its published sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..configs import check_numbers, check_positive


@dataclass(frozen=True)
class GPTConfig:
    """Shape of a LlamaGen-style GPT over image codes.

    Args:
        num_layers, num_heads, dim: transformer size; dim / num_heads must be a multiple of 4.
        vocab_size: number of codes K.
        block_size: codes per image, a square number (16x16 grid).
        num_classes: number of classes; one more embedding stands for "no class".
        rope_base: base of the rotary frequencies.
        norm_eps: RMSNorm epsilon.
        class_dropout: probability that training replaces the class with "no class".
        token_dropout, residual_dropout, ffn_dropout: dropout of embeddings and of both branches.
        drop_path: probability that training skips a branch of the last layer; it rises from 0 at
            the first layer.
        ffn_multiple_of: the feed-forward width int(2/3 * 4 * dim) is rounded up to a multiple of
            this.
    """

    num_layers: int = 12
    num_heads: int = 12
    dim: int = 768
    vocab_size: int = 16384
    block_size: int = 256
    num_classes: int = 1000
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    class_dropout: float = 0.1
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    ffn_dropout: float = 0.1
    drop_path: float = 0.0
    ffn_multiple_of: int = 256

    def __post_init__(self) -> None:
        counts = ("num_layers", "num_heads", "dim", "vocab_size", "block_size", "num_classes")
        check_positive(self, (*counts, "ffn_multiple_of"))
        dropouts = ("class_dropout", "token_dropout", "residual_dropout", "ffn_dropout")
        check_numbers(self, dict.fromkeys((*dropouts, "drop_path"), (0, 1)))
        check_numbers(self, {"rope_base": (1, math.inf), "norm_eps": (0, 1)})
        if self.dim % self.num_heads or self.head_dim % 4:
            raise ValueError(
                "GPTConfig: dim / num_heads must be a multiple of 4 (2-D rotary pairs), "
                f"got {self.dim} / {self.num_heads}"
            )
        if math.isqrt(self.block_size) ** 2 != self.block_size:
            raise ValueError(
                f"GPTConfig: block_size must be a square number, got {self.block_size}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def ffn_dim(self) -> int:
        width = int(2 * 4 * self.dim / 3)
        return -(-width // self.ffn_multiple_of) * self.ffn_multiple_of

    @classmethod
    def preset(cls, name: str, **overrides) -> GPTConfig:
        """Return the configuration of a published size, such as ``"GPT-L"``.

        Raises:
            ValueError: a name that is not in `PRESETS`.
        """
        if name not in PRESETS:
            raise ValueError(f"GPTConfig: unknown preset {name!r}; presets are {sorted(PRESETS)}")
        layers, heads, dim = PRESETS[name]
        return cls(**{"num_layers": layers, "num_heads": heads, "dim": dim, **overrides})


# (layers, heads, dim); the first six are the authors' release.
PRESETS = {
    "GPT-B": (12, 12, 768),
    "GPT-L": (24, 16, 1024),
    "GPT-XL": (36, 20, 1280),
    "GPT-XXL": (48, 24, 1536),
    "GPT-2B": (48, 32, 1920),
    "GPT-3B": (24, 32, 3200),
    # LlamaGen has these too, but no weights have been published.
    "GPT-1B": (22, 32, 2048),
    "GPT-XXXL": (48, 40, 2560),
    "GPT-7B": (32, 32, 4096),
}
