"""Data that a decoding step reads and writes: the weights and the static KV cache."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise to int8 [..., D] with float32 scales [...]: each row's largest magnitude / 127."""
    wide = x.float()
    scale = wide.abs().amax(-1) / 127
    # For a row of zeros any scale but zero will do.
    scale = torch.where(scale > 0, scale, 1.0)
    # Only the rounding of the quotient can push a value past 127.
    return (wide / scale[..., None]).round().clamp_(-127, 127).to(torch.int8), scale


def in_full(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``x`` [..., K] unchanged, or int8 times the rows' ``scale`` [...] in ``dtype``."""
    if scale is None:
        return x
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return (x.to(exact) * scale.to(exact)[..., None]).to(dtype)


def row_of(table: Tensor, position: int | Tensor) -> Tensor:
    """Return the row of one position, [1, ...], without reading a tensor's value on the host."""
    if isinstance(position, int):
        return table[position : position + 1]
    return table.index_select(0, position.reshape(1).long())


class Biases(NamedTuple):
    """Biases of a block's linear layers."""

    qkv: Tensor | None = None  # [3 H D]
    out: Tensor | None = None  # [C]
    up: Tensor | None = None  # [F]
    down: Tensor | None = None  # [C]


class HeadNorms(NamedTuple):
    """LayerNorms of each head's query and key, all [D]."""

    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor


class BlockWeights(NamedTuple):
    """One transformer block: x += attention(norm(x)); x += feed_forward(norm(x)).

    ``qkv`` holds the rows of all heads' queries, then keys, then values. ``up`` with 2 F rows is a
    SwiGLU's: the rows of the gate, which goes through silu, then those of its factor; with F rows
    it is followed by an exact GELU.

    The defaults are those of a LlamaGen block. A block with a ``condition`` has no norm weights:
    its norms are LayerNorms, each with a shift and a gain for every row, and each branch is
    multiplied by a gate before it is added to x.
    """

    attention_norm: Tensor | None  # [C], weight of an RMSNorm, like ffn_norm
    qkv: Tensor  # [3 H D, C]
    out: Tensor  # [C, H D]
    ffn_norm: Tensor | None  # [C]
    up: Tensor  # [2 F, C] or [F, C]
    down: Tensor  # [C, F]
    biases: Biases = Biases()  # with a GELU only
    head_norms: HeadNorms | None = None
    # [R, 6, C]: shift, gain and gate of attention, then of the feed-forward layer.
    condition: Tensor | None = None


class StepWeights(NamedTuple):
    """All weights that a step reads, except the embedding."""

    blocks: tuple[BlockWeights, ...]
    norm: Tensor | None  # [C], of the RMSNorm before the head
    head: Tensor  # [V, C]
    rotary: Tensor | None  # [T, D / 2, 2] float32, cosine and sine of every position
    eps: float = 1e-5  # epsilon of all norms
    head_bias: Tensor | None = None  # [V]
    # [R, 3, C]: what is added to the embedding; shift and gain of a LayerNorm before the head. All
    # blocks have a condition, or none has.
    condition: Tensor | None = None

    def first_rows(self, rows: int) -> StepWeights:
        """Return the same weights for the first ``rows`` sequences: a view of the conditions."""
        if self.condition is None:
            return self
        blocks = (b._replace(condition=b.condition[:rows]) for b in self.blocks)
        return self._replace(blocks=tuple(blocks), condition=self.condition[:rows])

    def tensors(self) -> list[Tensor]:
        """All of them in one list."""
        found = [self.norm, self.head, self.rotary, self.head_bias, self.condition]
        for block in self.blocks:
            for part in block:
                # Not +=, which torch 2.11 cannot compile for a list and a named tuple.
                found.extend(part if isinstance(part, tuple) else (part,))
        return [part for part in found if part is not None]


class LayerCache(NamedTuple):
    """Keys and values of one layer, [R, H, T, D].

    With float32 scales [R, H, T] both are int8 and stand for ``scale[..., None] * value``.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    @property
    def scales(self) -> dict[str, Tensor]:
        """The scales as keyword arguments of `ops.decode_attention`."""
        if self.key_scale is None:
            return {}
        return {"k_scale": self.key_scale, "v_scale": self.value_scale}

    def append(self, position: int | Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values [R, H, D] of one position, without reading a tensor's value."""
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
        # Not cache[:, :, position]: torch.compile would compile a variant for every position.
        cache.select(2, position).copy_(new)
    else:
        cache.index_copy_(2, position.reshape(1).long(), new[:, :, None])


class KVCache(tuple[LayerCache, ...]):
    """Keys and values of all layers, filled position by position; the size is fixed at creation."""

    @classmethod
    def empty(
        cls, layers: int, rows: int, heads: int, length: int, head_dim: int, *,
        dtype: torch.dtype, device: torch.device,
    ) -> KVCache:  # fmt: skip
        """Allocate for ``rows`` sequences of at most ``length`` positions; int8 adds scales."""
        shape = (rows, heads, length, head_dim)
        parts = [(shape, dtype)] * 2
        if dtype == torch.int8:
            parts += [(shape[:3], torch.float32)] * 2

        def layer() -> LayerCache:
            return LayerCache(*(torch.empty(s, dtype=d, device=device) for s, d in parts))

        return cls(layer() for _ in range(layers))

    def first_rows(self, rows: int) -> KVCache:
        """Return the first ``rows`` sequences, a view of the same memory."""
        return KVCache(layer.first_rows(rows) for layer in self)
