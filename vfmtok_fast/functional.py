"""Mathematics that the models and the oracles of several ops share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension: float32 up to the product, then x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary position embedding: interleaved pairs of x [..., D] turned by table [..., D / 2, 2].

    The table holds cosines and sines; both broadcast.
    """
    cos, sin = table.unbind(-1)
    wide = x if x.dtype == torch.float64 else x.float()
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def guided_logits(logits: Tensor, uncond_logits: Tensor | None, cfg_scale: float) -> Tensor:
    """Classifier-free guidance, in float32 at least; without ``uncond_logits`` there is none."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(dtype)
    if uncond_logits is None:
        return logits
    uncond_logits = uncond_logits.to(dtype)
    return uncond_logits + cfg_scale * (logits - uncond_logits)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set logits [B, V] outside the ``top_k`` largest, then outside the ``top_p`` nucleus, to -inf.

    Ties at the top-k threshold are all kept. The nucleus ends with the first code that takes the
    cumulative probability past ``top_p``; among equal logits the lower code counts first.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        # The mass before a code decides, so that the code which crosses top_p is kept.
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before > top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


def upsampling_kernel(weight: Tensor) -> Tensor:
    """Nearest x2 and then a 3x3 convolution, as the kernel of one transposed convolution, stride 2.

    Args:
        weight: [O, C, 3, 3] of the convolution, whose padding is 1.

    Returns:
        [C, O, 4, 4], channels last, for a padding of 1; sums of up to four weights, taken in
        float32 at least.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    # Along each side the kernel, turned round, is convolved with the box of two ones that repeats
    # a pixel. The first convolves by itself: a row of the result for each of its shifts.
    turn = wide.new_ones(4, 3).triu_(-1).tril_(0).flip(1)
    box = torch.einsum("ai,bj->abij", turn, turn).reshape(16, 9)
    kernel = box @ wide.flatten(2).permute(1, 2, 0)
    return kernel.to(weight.dtype).unflatten(1, (4, 4)).permute(0, 3, 1, 2)


def resize_positions(table: Tensor, grid: int, *, antialias: bool = False) -> Tensor:
    """Resize a square position table by bicubic interpolation, align_corners off.

    Args:
        table: [1, side * side, C].
        grid: the new side.
        antialias: False scales by (grid + 0.1) / side, which moves the coordinates a little, as
            DINOv2's class and the release's token decoder do. True resizes to ``grid`` with
            antialiasing, as DINOv2's published models with registers do.

    Returns:
        [1, grid * grid, C].
    """
    side = math.isqrt(table.shape[1])
    if side == grid:
        return table

    def resize(image: Tensor) -> Tensor:
        if antialias:
            return F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
        image = F.interpolate(image, scale_factor=(grid + 0.1) / side, mode="bicubic")
        assert image.shape[-1] == grid
        return image

    if table.requires_grad and torch.are_deterministic_algorithms_enabled():
        # On a GPU the interpolation's own gradient has no order of sums; a product's has.
        with torch.no_grad():
            basis = torch.eye(side * side, dtype=table.dtype, device=table.device)
            basis = resize(basis.view(-1, 1, side, side)).flatten(1)
        return torch.einsum("pq,bpc->bqc", basis, table)
    image = resize(rearrange(table, "1 (y x) c -> 1 c y x", y=side))
    return rearrange(image, "1 c y x -> 1 (y x) c")
