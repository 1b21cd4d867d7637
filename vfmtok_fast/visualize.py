"""Images that show what the tokenizer does."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from .images import image_grid, to_uint8
from .tokenizer import VFMTok

# Points are drawn at this multiple of the size and scaled down, for smooth edges.
SUPERSAMPLING = 3


def reconstruction_grid(tokenizer: VFMTok, images: Tensor, num_regions: int = 5) -> np.ndarray:
    """Lay out original | reconstruction | sampling points of a few regions, one row per image.

    Args:
        tokenizer: in eval mode; images are moved to its device.
        images: [B, 3, S, S] floating, in [-1, 1].
        num_regions: regions to draw, spread over the image.

    Returns:
        uint8 [B * S, 3 * S, 3].
    """
    weight = tokenizer.quantizer.codebook
    cells = []
    for image in images.split(1):  # One at a time, so that memory does not grow with the batch.
        image = image.to(weight.device, weight.dtype)
        locations, weights = tokenizer.sampling_points(image)
        original = to_uint8(image.float())[0]
        decoded = tokenizer.decode(tokenizer.encode(image)).float().clamp(-1, 1)
        regions = draw_regions(
            original.cpu().numpy(), locations[0].float(), weights[0].float(), num_regions
        )
        cells += [original.cpu(), to_uint8(decoded)[0].cpu(), torch.from_numpy(regions)]
    return image_grid(torch.stack(cells), columns=3)


def draw_regions(image: np.ndarray, locations: Tensor, weights: Tensor, num: int) -> np.ndarray:
    """Draw the sampling points of ``num`` regions over a darkened image.

    Each region has one colour. A cross marks its reference point. Discs mark its samples, with an
    area proportional to the attention weight. Samples outside the image, which read zeros, are not
    shown.

    Args:
        image: uint8 [S, S, 3].
        locations: [R, H, L, P, 2], (x, y) in [0, 1] of the image.
        weights: [R, H, L, P], summing to 1 per region and head.
        num: regions to draw.

    Returns:
        uint8 [S, S, 3].
    """
    side = math.isqrt(len(locations))
    chosen = spread_regions(len(locations), num)
    size = image.shape[0] * SUPERSAMPLING
    canvas = Image.fromarray((image * 0.45).astype(np.uint8)).resize((size, size))
    draw = ImageDraw.Draw(canvas)
    for i, region in enumerate(chosen):
        red, green, blue = colorsys.hsv_to_rgb(i / num, 0.75, 1.0)
        colour = (round(255 * red), round(255 * green), round(255 * blue))
        points = locations[region].flatten(0, -2).tolist()
        shares = (weights[region] / weights.shape[1]).flatten().tolist()
        for (x, y), share in zip(points, shares, strict=True):
            radius = size * max(0.003, 0.04 * math.sqrt(share))
            centre = (x * size, y * size)
            box = [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]
            draw.ellipse(box, fill=colour)
        x = (region % side + 0.5) / side * size
        y = (region // side + 0.5) / side * size
        arm = size * 0.02
        for line in ([x - arm, y, x + arm, y], [x, y - arm, x, y + arm]):
            draw.line(line, fill=(255, 255, 255), width=SUPERSAMPLING * 2)
    return np.array(canvas.resize(image.shape[:2], Image.Resampling.LANCZOS))


def spread_regions(total: int, num: int) -> list[int]:
    """Choose ``num`` distinct regions far from one another in a square of ``total`` regions."""
    side = math.isqrt(total)
    if num > side:
        return [i * total // num for i in range(num)]
    # Along a diagonal lattice, so that neither rows nor columns coincide.
    steps = [(i + 0.5) / num for i in range(num)]
    across = (steps[(2 * i) % num] for i in range(num))
    return [int(y * side) * side + int(x * side) for x, y in zip(steps, across, strict=True)]
