"""`ops.deformable_sample` on a CPU: all levels at once, as bags of weighted rows.

A sample is a weighted sum of four pixels, and an output is the weighted sum of its L*P samples. So
an output is one weighted sum of 4*L*P rows of ``value``, seen as a table [B*S*H, D], which
`embedding_bag` computes without materialising the rows. A pixel outside its level gets weight zero
and the nearest index inside.

Gradients are torch's own: those of the table by sorted rows and those of the weights by dot
products, both in a fixed order; those of locations and logits through the weights. Locations are
float32 for half-precision input, where the reference rounds them to the input's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor


def deformable_sample(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], reference_points: Tensor,
    offsets: Tensor, attention_logits: Tensor, deterministic: bool = True,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.deformable_sample`; ``deterministic`` has no effect here."""
    B, S, H, D = value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    dtype = torch.promote_types(value.dtype, torch.float32)
    integer = torch.int32 if B * S * H < 2**31 else torch.int64

    def per_level(numbers: Iterable[int], dtype: torch.dtype) -> Tensor:
        # Filled on the device, because a captured graph cannot copy numbers from the host.
        return torch.cat([value.new_full((1, 1), number, dtype=dtype) for number in numbers])

    def axis(xy: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = per_level((shape[1 - xy] for shape in spatial_shapes), dtype)
        centre = reference_points[:, :, None, :, None, xy].to(dtype) * sizes - 0.5
        return _pixels(offsets[..., xy].to(dtype) + centre, sizes, integer)

    left, right, by_left, by_right = axis(0)
    upper, lower, by_upper, by_lower = axis(1)
    attention = attention_logits.to(dtype).softmax(dim=-1).view(B, Q, H, L, P)
    by_upper, by_lower = by_upper * attention, by_lower * attention
    weights = torch.stack(
        [by_upper * by_left, by_upper * by_right, by_lower * by_left, by_lower * by_right], dim=-1
    )

    width = per_level((width for _, width in spatial_shapes), integer) * H
    start = accumulate((height * width for height, width in spatial_shapes[:-1]), initial=0)
    image = torch.arange(B, dtype=integer, device=value.device).view(-1, 1, 1, 1, 1) * (S * H)
    head = torch.arange(H, dtype=integer, device=value.device).view(-1, 1, 1)
    first = image + head + per_level(start, integer) * H
    upper, lower = first + upper * width, first + lower * width
    left, right = left * H, right * H
    index = torch.stack([upper + left, upper + right, lower + left, lower + right], dim=-1)

    output = F.embedding_bag(
        index.view(B * Q * H, 4 * L * P),
        value.reshape(B * S * H, D),
        mode="sum",
        per_sample_weights=weights.to(value.dtype).view(B * Q * H, 4 * L * P),
    )
    return output.view(B, Q, H * D)


def _pixels(
    place: Tensor, size: Tensor, integer: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the two pixels around each place along one axis, and their weights.

    Args:
        place: [..., L, P] in pixels, pixel centres at whole numbers.
        size: [L, 1] pixels of each level.
        integer: dtype of the indices.
    """
    first = place.floor()
    share = place - first
    # Places further out need not be told apart, and not all floats fit an integer.
    first = first.detach().clamp(min=-2).minimum(size).to(integer)
    last = size.to(integer) - 1
    second = first + 1
    by_first = torch.where((first >= 0) & (first <= last), 1 - share, 0)
    by_second = torch.where((second >= 0) & (second <= last), share, 0)
    first, second = (index.clamp(min=0).minimum(last) for index in (first, second))
    return first, second, by_first, by_second
