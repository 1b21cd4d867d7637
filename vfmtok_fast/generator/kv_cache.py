"""The static KV cache of generation."""

from __future__ import annotations

import torch

from .config import GPTConfig


class KVCache:
    """Keys and values, one tensor [B, H, T, D] per layer, filled position by position.

    Its size is fixed when it is made: block_size positions, the class and all codes but the last.
    """

    def __init__(self, config: GPTConfig, batch: int, device: torch.device, dtype: torch.dtype):
        self.config = config
        shape = (batch, config.num_heads, config.block_size, config.head_dim)
        self.keys, self.values = (
            [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_layers)]
            for _ in range(2)
        )

    def first_rows(self, rows: int) -> KVCache:
        """The first ``rows`` of the batch, a view of the same memory."""
        view = object.__new__(KVCache)
        view.config = self.config
        view.keys = [keys[:rows] for keys in self.keys]
        view.values = [values[:rows] for values in self.values]
        return view
