"""The static KV cache of generation."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import GPTConfig


class KVCache:
    """Keys and values of all layers, [layers, B, H, T, D] each, filled position by position.

    Its size is fixed when it is made: block_size positions, the class and all codes but the last.
    """

    def __init__(self, config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_layers, batch, config.num_heads, config.block_size, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one position's k and v [B, H, D] of ``layer`` and return that layer's whole cache.

        The position counts as live once `advance` is called, after the last layer.
        """
        self.keys[layer, :, :, self.length] = k
        self.values[layer, :, :, self.length] = v
        return self.keys[layer], self.values[layer]

    def advance(self) -> None:
        self.length += 1

    def keep_rows(self, rows: int) -> None:
        """Forget all but the first ``rows`` of the batch."""
        self.keys, self.values = self.keys[:, :rows], self.values[:, :rows]
