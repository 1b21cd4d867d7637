"""Arguments of `ops.decode_step`, for the tests of all its implementations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from vfmtok_fast.decoding import (
    Biases,
    BlockWeights,
    HeadNorms,
    KVCache,
    LayerCache,
    StepWeights,
    in_8_bits,
)

EPS = 1e-5


def make(
    rows=2, H=2, D=8, T=6, ffn=20, V=11, layers=2, dtype=torch.float32, int8_cache=False, seed=0,
    rar=False,
) -> list:  # fmt: skip
    """Return arguments for position 3; the caches hold NaN from there on.

    ``rar``: the weights are those of a RAR, else of a GPT.
    """
    draw = torch.Generator().manual_seed(seed)
    C = H * D

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def weight(N: int, K: int) -> Tensor:
        return (normal(N, K) / max(K, 1) ** 0.5).to(dtype)

    def norm(size: int = C) -> Tensor:
        return (1 + 0.2 * normal(size)).to(dtype)

    def bias(size: int) -> Tensor:
        return (0.2 * normal(size)).to(dtype)

    def block() -> BlockWeights:
        if not rar:
            return BlockWeights(
                norm(), weight(3 * C, C), weight(C, C), norm(), weight(2 * ffn, C), weight(C, ffn),
            )  # fmt: skip
        return BlockWeights(
            None, weight(3 * C, C), weight(C, C), None, weight(ffn, C), weight(C, ffn),
            Biases(bias(3 * C), bias(C), bias(ffn), bias(C)),
            HeadNorms(norm(D), bias(D), norm(D), bias(D)),
        )  # fmt: skip

    blocks = tuple(block() for _ in range(layers))
    cached = []
    for _ in range(layers):
        parts = [normal(rows, H, T, D) for _ in range(2)]
        if int8_cache:
            (k, k_scale), (v, v_scale) = (in_8_bits(part) for part in parts)
            k_scale[:, :, 3:], v_scale[:, :, 3:] = float("nan"), float("nan")
            cached.append(LayerCache(k, v, k_scale, v_scale))
        else:
            for part in parts:
                part[:, :, 3:] = float("nan")
            cached.append(LayerCache(*(part.to(dtype) for part in parts)))
    angle = normal(T, D // 2)
    rotary = torch.stack([angle.cos(), angle.sin()], dim=-1).float()
    weights = StepWeights(blocks, norm(), weight(V, C), rotary, EPS)
    if rar:
        # As a decoder keeps them: slices of one table, in which every gain and gate is around 1.
        table = (0.5 + 0.2 * normal(rows, 3 + 6 * layers, C)).to(dtype)
        parts = table[:, 3:].split(6, dim=1)
        blocks = tuple(b._replace(condition=p) for b, p in zip(blocks, parts, strict=True))
        weights = StepWeights(
            blocks, None, weight(V, C), None, EPS, head_bias=bias(V), condition=table[:, :3]
        )
    code = torch.randint(0, 7, (rows,), generator=draw)
    return [code, normal(7, C).to(dtype), weights, KVCache(tuple(cached)), 3]


def changed(arguments: list, to: Callable[[Tensor], Tensor]) -> list:
    """Return a copy of the arguments in which ``to`` replaces every tensor."""

    def change(value: object) -> object:
        return to(value).clone() if isinstance(value, Tensor) else value

    code, embedding, weights, cache, *rest = arguments
    layers = tuple(LayerCache(*map(change, layer)) for layer in cache)
    return [*tree_map(change, [code, embedding, weights]), KVCache(layers), *rest]


def copied(arguments: list) -> list:
    """Return the same arguments with a copy of the cache."""
    return [*arguments[:3], *changed(arguments, lambda t: t)[3:]]
