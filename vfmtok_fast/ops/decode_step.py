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

    What ``weights`` hold decides what a block computes, that of a LlamaGen GPT or of RAR; see
    `vfmtok_fast.decoding.BlockWeights`. Norms and rotation run in float32. Attention is
    `ops.decode_attention`, whose implementation is chosen separately. For inference only: there is
    no backward pass.

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

    Source: LlamaGen (arXiv 2406.06525), autoregressive/models/gpt.py; RAR (arXiv 2411.00776).
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
        if (block.condition is None) != (weights.condition is None):
            raise TypeError(f"{name}: all blocks must have a condition, and the head, or none")
        _check_norms(
            f" of block {i}", block.condition, (R, 6, C), embedding,
            attention_norm=block.attention_norm, ffn_norm=block.ffn_norm,
        )  # fmt: skip
        gelu = block.up.shape[0] == block.down.shape[-1]
        if block.biases.up is not None and not gelu:
            raise ValueError(f"{name}: up of block {i} must have no bias, because it has a gate")
        F = block.up.shape[0] // (1 if gelu else 2)
        shapes = {
            "qkv": (3 * H * D, C), "out": (C, H * D), "up": (F if gelu else 2 * F, C),
            "down": (C, F),
        }  # fmt: skip
        for part, shape in shapes.items():
            _check_part(f"{part} of block {i}", getattr(block, part), shape, embedding)
            if (bias := getattr(block.biases, part)) is not None:
                _check_part(f"bias of {part} of block {i}", bias, shape[:1], embedding)
        if block.head_norms is not None:
            for part, norm in zip(block.head_norms._fields, block.head_norms, strict=True):
                _check_part(f"{part} of block {i}", norm, (D,), embedding)
    _check_norms("", weights.condition, (R, 3, C), embedding, norm=weights.norm)
    _check_part("head", weights.head, (weights.head.shape[0], C), embedding)
    if weights.head_bias is not None:
        _check_part("head_bias", weights.head_bias, (weights.head.shape[0],), embedding)
    rotary, last = weights.rotary, T
    if rotary is not None:
        check_tensor(name, "rotary", rotary, "[T, D / 2, 2]", 3)
        check_shape(name, "rotary", rotary, (rotary.shape[0], D // 2, 2))
        check_on(name, "rotary", rotary, "embedding", embedding)
        last = min(T, rotary.shape[0])
    check_position(name, "position", position, 0, last, (1,), embedding=embedding)
    check_position(name, "length", length, 1, last + 1, (1,), embedding=embedding)
    check_eps(name, weights.eps)


def _check_norms(
    of: str, condition: Tensor | None, shape: tuple[int, ...], like: Tensor, **norms: Tensor | None
) -> None:
    """Require either norms [C] or a condition."""
    if condition is not None:
        _check_part(f"condition{of}", condition, shape, like)
    for part, norm in norms.items():
        if condition is None:
            check_tensor("decode_step", f"{part}{of}", norm, "[C]", 1)
            _check_part(f"{part}{of}", norm, shape[2:], like)
        elif norm is not None:
            raise TypeError(f"decode_step: {part}{of} must be None, because there is a condition")


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
