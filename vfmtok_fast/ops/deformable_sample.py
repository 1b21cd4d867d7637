"""Multi-scale deformable sampling, the attention of Deformable DETR."""

from __future__ import annotations

import operator

from torch import Tensor

from ..reference import deformable_sample as reference
from ..switch import Op
from .checks import check_same, check_shape, check_tensor

_op = Op("deformable_sample", reference.deformable_sample)


def deformable_sample(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    offsets: Tensor,
    attention_logits: Tensor,
    *,
    deterministic: bool = True,
) -> Tensor:
    """Sample every level around each query's reference point and sum with softmax weights.

    A sample is located at ``reference + offset / (W_l, H_l)`` in [0, 1] of its level. Values are
    interpolated bilinearly between pixel centres (``align_corners=False``) and are zero outside.
    The weights are a softmax over all L*P samples of a head. Differentiable in value, offsets,
    logits and reference points; the fast implementations support first derivatives only.

    Args:
        value: [B, S, H, D], the levels one after the other, S = sum of H_l*W_l; D >= 1.
        spatial_shapes: (height, width) of each of the L levels, L >= 1. A tensor of these also
            works, but costs a synchronisation if it is on a GPU.
        reference_points: [B or 1, Q, L, 2], (x, y) in [0, 1].
        offsets: [B, Q, H, L, P, 2], (x, y) in pixels of the level, P >= 1.
        attention_logits: [B, Q, H, L*P].
        deterministic: whether the gradient of ``value`` has the same bits on every run. False lets
            the Triton implementation sum it with atomics in float32, unless
            ``torch.use_deterministic_algorithms(True)`` is set in the backward pass. The reference
            and the CPU implementation ignore this argument.
        All tensors are floating, with one dtype and device.

    Returns:
        [B, Q, H*D], dtype of ``value``. A NaN or infinite location gives an unspecified value, but
        only for its own query and head.

    Raises:
        TypeError: not floating tensors, two dtypes, levels that are not pairs of integers, or a
            ``deterministic`` that is not a bool.
        ValueError: shapes that do not fit together, two devices, or no level, point or channel.

    Source: Deformable DETR (arXiv 2010.04159) equation 3; VFMTok section 3.1.
    """
    name = "deformable_sample"
    check_tensor(name, "value", value, "[B, S, H, D]", 4)
    check_tensor(name, "offsets", offsets, "[B, Q, H, L, P, 2]", 6)
    check_tensor(name, "reference_points", reference_points, "[B or 1, Q, L, 2]", 4)
    check_tensor(name, "attention_logits", attention_logits, "[B, Q, H, L*P]", 4)
    check_same(
        name,
        value=value,
        offsets=offsets,
        reference_points=reference_points,
        attention_logits=attention_logits,
    )
    B, S, H, D = value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    check_shape(name, "offsets", offsets, (B, Q, H, L, P, 2))
    check_shape(name, "reference_points", reference_points, (reference_points.shape[0], Q, L, 2))
    check_shape(name, "attention_logits", attention_logits, (B, Q, H, L * P))
    if reference_points.shape[0] not in (1, B):
        raise ValueError(
            f"{name}: reference_points must have 1 or {B} rows, got {reference_points.shape[0]}"
        )
    if min(L, P, D) < 1:
        raise ValueError(
            f"{name}: there must be at least one level, point and channel, got L={L}, P={P}, D={D}"
        )
    spatial_shapes = _pairs(spatial_shapes)
    pixels = sum(height * width for height, width in spatial_shapes)
    if len(spatial_shapes) != L or pixels != S or any(min(pair) < 1 for pair in spatial_shapes):
        raise ValueError(
            f"{name}: spatial_shapes must be {L} (height, width) pairs with {S} pixels in all, "
            f"got {spatial_shapes}"
        )
    if not isinstance(deterministic, bool):
        raise TypeError(f"{name}: deterministic must be True or False, got {deterministic!r}")
    return _op(value, spatial_shapes, reference_points, offsets, attention_logits, deterministic)


def _pairs(spatial_shapes: object) -> tuple[tuple[int, int], ...]:
    try:
        return tuple(
            (operator.index(height), operator.index(width)) for height, width in spatial_shapes
        )
    except (TypeError, ValueError):
        got = " ".join(str(spatial_shapes).split())
        raise TypeError(
            f"deformable_sample: spatial_shapes must be (height, width) pairs of integers, "
            f"got {got}"
        ) from None
