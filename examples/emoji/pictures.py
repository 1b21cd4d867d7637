"""The emoji set as tensors, and the augmentation for training the examples' own networks."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


@dataclass
class Emoji:
    """uint8 images [N, 3, 128, 128], and their group and subgroup [N] int64 (-1: not known)."""

    images: Tensor
    labels: Tensor
    subgroups: Tensor


def read(path: str | Path) -> Emoji:
    """Read what `prepare.py` wrote: the Parquet file, or the class folders."""
    if Path(path).is_dir():
        files = sorted(Path(path).glob("*/*.webp"))
        groups = sorted({file.parent.name for file in files})
        pictures = [file.read_bytes() for file in files]
        labels = [groups.index(file.parent.name) for file in files]
        subgroups = [-1] * len(files)
    else:
        columns = pq.read_table(path, columns=["image", "label", "subgroup"]).to_pydict()
        pictures = [image["bytes"] for image in columns["image"]]
        labels, subgroups = columns["label"], columns["subgroup"]
    arrays = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return Emoji(images, torch.tensor(labels), torch.tensor(subgroups))


def augment(images: Tensor, size: int, colour: float = 0.3) -> Tensor:
    """Rotate, zoom, shift, mirror and tint each image at random, with torch's random numbers.

    Args:
        images: uint8 [B, 3, H, H].
        size: side of the returned images.
        colour: range of each channel's random gain and offset.

    Returns:
        [B, 3, size, size] in [0, 1].
    """
    count = len(images)
    angle = (torch.rand(count) - 0.5) * 0.6
    zoom = 0.75 + 0.4 * torch.rand(count)
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    across, down = angle.cos() * zoom, angle.sin() * zoom
    shift = (torch.rand(count, 2) - 0.5) * 0.3
    first = torch.stack([across * mirror, -down, shift[:, 0]], dim=1)
    second = torch.stack([down * mirror, across, shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([first, second], 1), (count, 3, size, size), False)
    x = F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False)
    gain = 1 + colour * (torch.rand(count, 3, 1, 1) - 0.5)
    return (1 - (1 - x) * gain + 0.3 * colour * (torch.rand(count, 3, 1, 1) - 0.5)).clamp(0, 1)
