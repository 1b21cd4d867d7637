"""What a decoding step reads and writes: weights, and the static cache of keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., D] and float32 scales [...]: the largest magnitude of each row / 127."""
    wide = x.float()
    scale = wide.abs().amax(-1) / 127
    # A row of zeros has any scale but zero.
    scale = torch.where(scale > 0, scale, 1.0)
    # A value may exceed 127 by rounding alone, of the quotient.
    return (wide / scale[..., None]).round().clamp_(-127, 127).to(torch.int8), scale


def in_full(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x`` [..., K] itself; or of int8, times ``scale`` [...] of its rows, in ``dtype``."""
    if scale is None:
        return x
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return (x.to(exact) * scale.to(exact)[..., None]).to(dtype)


def row_of(table: Tensor, position: int | Tensor) -> Tensor:
    """The row of one position [1, ...]; no value of a tensor is read."""
    if isinstance(position, int):
        return table[position : position + 1]
    return table.index_select(0, position.reshape(1).long())


class BlockWeights(NamedTuple):
    """One transformer block: x += attention(norm(x)); x += SwiGLU(norm(x)).

    ``qkv`` has the rows of all heads' queries, then keys, then values; ``gate_up`` those of the
    gate, whose silu is taken, then of what it is multiplied with.
    """

    attention_norm: Tensor  # [C], of an RMSNorm, as ffn_norm
    qkv: Tensor  # [3 H D, C]
    out: Tensor  # [C, H D]
    ffn_norm: Tensor  # [C]
    gate_up: Tensor  # [2 F, C]
    down: Tensor  # [C, F]


class StepWeights(NamedTuple):
    """All that a step reads but the embedding."""

    blocks: tuple[BlockWeights, ...]
    norm: Tensor  # [C], before the head
    head: Tensor  # [V, C]
    rotary: Tensor  # [T, D / 2, 2] float32, cosine and sine of every position
    eps: float = 1e-5  # of all norms


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

    def append(self, position: int | Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [R, H, D] of one position; no value of a tensor is read."""
        parts = ((self.keys, self.key_scale, keys), (self.values, self.value_scale, values))
        for cache, scales, new in parts:
            if scales is not None:
                new, scale = in_8_bits(new)
                _put(scales, position, scale)
            _put(cache, position, new)

    def first_rows(self, rows: int) -> LayerCache:
        return LayerCache(*(None if part is None else part[:rows] for part in self))


def _put(cache: Tensor, position: int | Tensor, new: Tensor) -> None:
    if isinstance(position, int):
        # Not cache[:, :, position], of which torch.compile makes a variant for every position.
        cache.select(2, position).copy_(new)
    else:
        cache.index_copy_(2, position.reshape(1).long(), new[:, :, None])


class KVCache(tuple[LayerCache, ...]):
    """Keys and values of all layers, filled position by position; of a size fixed when made."""

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, length: int, head_dim: int, *,
        dtype: torch.dtype, device: torch.device,
    ) -> KVCache:  # fmt: skip
        """Of ``rows`` sequences of at most ``length`` positions; int8 comes with scales."""
        shape = (rows, heads, length, head_dim)
        parts = [(shape, dtype)] * 2
        if dtype == torch.int8:
            parts += [(shape[:3], torch.float32)] * 2

        def layer() -> LayerCache:
            return LayerCache(*(torch.empty(s, dtype=d, device=device) for s, d in parts))

        return cls(layer() for _ in range(layers))

    def first_rows(self, rows: int) -> KVCache:
        """The first ``rows`` sequences, a view of the same memory."""
        return KVCache(layer.first_rows(rows) for layer in self)
