"""The static KV cache of generation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LayerCache(NamedTuple):
    """Keys and values of one layer [R, H, T, D].

    With scales [R, H, T] float32 both are int8, and stand for ``scale[..., None] * value``.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def scales(self) -> dict[str, Tensor]:
        """As keywords of `ops.decode_attention`."""
        if self.key_scale is None:
            return {}
        return {"k_scale": self.key_scale, "v_scale": self.value_scale}

    def first_rows(self, rows: int) -> LayerCache:
        return LayerCache(*(None if part is None else part[:rows] for part in self))


@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers, filled position by position; of a size fixed when made."""

    layers: tuple[LayerCache, ...]

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, length: int, head_dim: int, *,
        dtype: torch.dtype, device: torch.device,
    ) -> KVCache:  # fmt: skip
        """Of ``rows`` sequences of at most ``length`` positions; int8 comes with scales."""
        shape = (rows, heads, length, head_dim)

        def new(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def layer() -> LayerCache:
            scales = (None, None)
            if dtype == torch.int8:
                scales = tuple(new(*shape[:3], dtype=torch.float32) for _ in range(2))
            return LayerCache(new(*shape, dtype=dtype), new(*shape, dtype=dtype), *scales)

        return cls(tuple(layer() for _ in range(layers)))

    def first_rows(self, rows: int) -> KVCache:
        """The first ``rows`` sequences, a view of the same memory."""
        return KVCache(tuple(layer.first_rows(rows) for layer in self.layers))

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)
