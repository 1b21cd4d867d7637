"""Reference of `ops.deformable_sample`: bilinear `grid_sample`, one level at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def deformable_sample(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], reference_points: Tensor,
    offsets: Tensor, attention_logits: Tensor, deterministic: bool = True,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.deformable_sample`; ``deterministic`` has no effect here."""
    B, _, H, D = value.shape
    Q, L, P = offsets.shape[1], offsets.shape[3], offsets.shape[4]
    weights = attention_logits.softmax(dim=-1).view(B, Q, H, L, P)

    output = value.new_zeros(B * H, D, Q)
    levels = value.split([height * width for height, width in spatial_shapes], dim=1)
    for level, (height, width) in enumerate(spatial_shapes):
        image = levels[level].permute(0, 2, 3, 1).reshape(B * H, D, height, width)
        # For half precision on a CPU, grid_sample keeps strides in 16 bits, and reads the wrong
        # memory if those of a view are larger (torch 2.14).
        image = image.contiguous()
        # Filled on the device, because a captured graph cannot copy numbers from the host.
        size = torch.cat([offsets.new_full((1,), side) for side in (width, height)])
        location = reference_points[:, :, None, level, None] + offsets[:, :, :, level] / size
        # [0, 1] to grid_sample's [-1, 1]; [B, Q, H, P, 2] to [B*H, Q, P, 2].
        grid = (2 * location - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(
            image, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        weight = weights[:, :, :, level].transpose(1, 2).reshape(B * H, 1, Q, P)
        output = output + (sampled * weight).sum(dim=-1)
    return output.view(B, H * D, Q).transpose(1, 2)
