"""One step of generation: from a code to the logits of the next one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..decoding import KVCache, StepWeights
from ..reference import decode_step as reference
from ..switch import Op
from .checks import (
    check_eps,
    check_integers,
    check_on,
    check_position,
    check_range,
    check_shape,
    check_tensor,
)
from .decode_attention import decode_attention

_op = Op("decode_step", reference.decode_step)


@torch.no_grad()
def decode_step(
    code: Tensor,
    embedding: Tensor,
    weights: StepWeights,
    cache: KVCache,
    position: int | Tensor,
    length: int | Tensor | None = None,
) -> Tensor:
    """Compute the logits of the code after ``code``, and write its keys and values to the cache.

    RMSNorm and rotation run in float32. Attention is `ops.decode_attention`, whose implementation
    is chosen separately. For inference only: there is no backward pass.

    Args:
        code: [R] int64, one row of ``embedding`` for each row of the cache.
        embedding: [N, C], of codes, or of classes in the first step.
        weights: of all blocks and the head, in the embedding's dtype.
        cache: one layer for each block, with R rows, in that dtype or int8; ``position`` is
            overwritten in every layer.
        position: in 0..T - 1: an int, or an integer tensor of one element that stays on its device
            (its value is not checked, which would need a synchronisation).
        length: ``position + 1``, of the same kind. Pass it if you have it: on a GPU computing it
            costs a launch.

    Returns:
        float32 [R, V] (float64 for float64 weights).

    Raises:
        TypeError: not floating tensors, two dtypes, codes that are not int64, autocast, or a
            position that is not an integer.
        ValueError: shapes that do not fit together, two devices, or a position or code out of
            range.

    Source: LlamaGen (arXiv 2406.06525), autoregressive/models/gpt.py.
    """
    if length is None:
        length = position + 1
    _check(code, embedding, weights, cache, position, length)
    return _op(code, embedding, weights, cache, position, length, decode_attention)


def _check(
    code: Tensor, embedding: Tensor, weights: StepWeights, cache: KVCache,
    position: int | Tensor, length: int | Tensor,
) -> None:  # fmt: skip
    name = "decode_step"
    check_tensor(name, "embedding", embedding, "[N, C]", 2)
    if len(cache) != len(weights.blocks) or not weights.blocks:
        raise ValueError(
            f"{name}: the cache must have a layer for each block, got {len(cache)} for "
            f"{len(weights.blocks)}"
        )
    keys, C = cache[0].keys, embedding.shape[1]
    if keys.ndim != 4 or keys.shape[3] % 2:
        raise ValueError(
            f"{name}: keys of layer 0 must have shape [R, H, T, D], D even, got {tuple(keys.shape)}"
        )
    R, H, T, D = cached = tuple(keys.shape)
    check_integers(name, "code", code, (R,))
    check_on(name, "code", code, "embedding", embedding)
    if code.dtype != torch.int64:
        raise TypeError(f"{name}: code must be torch.int64, got {code.dtype}")
    if code.device.type == "cpu":  # Elsewhere it would have to be waited for.
        check_range(name, "code", code, 0, embedding.shape[0])
    if torch.is_autocast_enabled(embedding.device.type):
        raise TypeError(
            f"{name}: must not run under autocast, which would change dtypes op by op; convert "
            "the model instead, for example with gpt.bfloat16()"
        )
    for i, (block, layer) in enumerate(zip(weights.blocks, cache, strict=True)):
        if (layer.key_scale is None) != (layer.value_scale is None):
            raise TypeError(f"{name}: keys and values of layer {i} must both have scales, or none")
        _check_part(f"keys of layer {i}", layer.keys, cached, embedding, layer.key_scale)
        _check_part(f"values of layer {i}", layer.values, cached, embedding, layer.value_scale)
        F = block.gate_up.shape[0] // 2
        shapes = {
            "attention_norm": (C,), "qkv": (3 * H * D, C), "out": (C, H * D),
            "ffn_norm": (C,), "gate_up": (2 * F, C), "down": (C, F),
        }  # fmt: skip
        for part, shape in shapes.items():
            _check_part(f"{part} of block {i}", getattr(block, part), shape, embedding)
    _check_part("norm", weights.norm, (C,), embedding)
    _check_part("head", weights.head, (weights.head.shape[0], C), embedding)
    rotary = weights.rotary
    check_tensor(name, "rotary", rotary, "[T, D / 2, 2]", 3)
    check_shape(name, "rotary", rotary, (rotary.shape[0], D // 2, 2))
    check_on(name, "rotary", rotary, "embedding", embedding)
    last = min(T, rotary.shape[0])
    check_position(name, "position", position, 0, last, (1,), embedding=embedding)
    check_position(name, "length", length, 1, last + 1, (1,), embedding=embedding)
    check_eps(name, weights.eps)


def _check_part(
    what: str, part: Tensor, shape: tuple[int, ...], like: Tensor, scale: Tensor | None = None
) -> None:
    """Require ``shape``, and the dtype of ``like``, or int8 for a part of a cache with scales."""
    check_shape("decode_step", what, part, shape)
    if part.dtype != (like.dtype if scale is None else torch.int8):
        wanted = f"{like.dtype}, as embedding is" if scale is None else "int8, as it has a scale"
        alone = " without a scale" if part.dtype == torch.int8 else ""
        raise TypeError(f"decode_step: {what} must be {wanted}, got {part.dtype}{alone}")
    check_on("decode_step", what, part, "embedding", like)
    if scale is None:
        return
    if tuple(scale.shape) != shape[:-1] or scale.dtype != torch.float32:
        raise ValueError(
            f"decode_step: the scale of {what} must be float32 of shape {shape[:-1]}, "
            f"got {scale.dtype} {tuple(scale.shape)}"
        )
    check_on("decode_step", f"the scale of {what}", scale, "embedding", like)
