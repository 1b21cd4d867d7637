"""Mathematics that the models and the oracles of several ops share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def through(
    layers: Iterable[Callable[..., Tensor]], x: Tensor, *others: object, recompute: bool = False
) -> Tensor:
    """x through layers, one after another; each is given ``others`` too.

    ``recompute`` keeps only what goes into each layer for the gradients (gradient checkpointing).
    """
    for layer in layers:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(layer, x, *others, use_reentrant=False)
        else:
            x = layer(x, *others)
    return x


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
    # a pixel: with itself shifted by one. Sums, not a product, which could round to TF32.
    wide = wide.flip(2, 3)
    wide = F.pad(wide, (0, 1)) + F.pad(wide, (1, 0))
    wide = F.pad(wide, (0, 0, 0, 1)) + F.pad(wide, (0, 0, 1, 0))
    return wide.to(weight.dtype).transpose(0, 1).contiguous(memory_format=torch.channels_last)


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
    image = rearrange(table, "1 (y x) c -> 1 c y x", y=side)
    if image.is_cuda and not antialias:
        # torch's kernel has a thread for each pixel, which walks through all channels.
        image = _resized_by_sides(image, (grid + 0.1) / side)
    elif antialias:
        image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    else:
        image = F.interpolate(image, scale_factor=(grid + 0.1) / side, mode="bicubic")
    assert image.shape[-1] == grid
    return rearrange(image, "1 c y x -> 1 (y x) c")


def _resized_by_sides(image: Tensor, scale: float) -> Tensor:
    """What bicubic `F.interpolate` of a square image [1, C, S, S] gives, side after side.

    By sums in float32 at least, which no setting rounds to TF32; without host or constants, so that
    graphs and torch.compile take it.
    """
    wide = image if image.dtype == torch.float64 else image.float()
    side = image.shape[-1]
    # What one side becomes of each unit vector: [new, S].
    units = torch.eye(side, dtype=wide.dtype, device=wide.device).view(1, side, side, 1)
    rows = F.interpolate(units, scale_factor=(scale, 1.0), mode="bicubic")[0, :, :, 0].T
    # Channels last, as the table has them.
    wide = wide[0].permute(1, 2, 0)
    wide = (rows[:, :, None, None] * wide).sum(1)
    wide = (rows[:, :, None] * wide[:, None]).sum(2)
    return wide.permute(2, 0, 1)[None].to(image.dtype)


def head_in_chunks(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, grad: Tensor | None,
    wanted: tuple[bool, bool, bool], chunk_bytes: int,
    turn: Callable[[Tensor, Tensor, Tensor | None, Tensor], None],
    add_product: Callable[[Tensor, Tensor, Tensor], None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Losses of an output layer and their gradients, with the logits of a few rows at a time.

    Args:
        x, weight, targets, bias: as of `ops.linear_cross_entropy`.
        grad: [N], factors of the rows' gradients, or None for 1.
        wanted: which gradients, of x, weight and bias.
        chunk_bytes: of the logits that are there at a time.
        turn: of logits, targets, factors and memory for losses, writes the losses, and where
            anything is wanted the losses' gradients over the logits.
        add_product: ``(sums, a, b)`` adds a @ b to ``sums``, which are float32 at least.

    Returns:
        losses [N]; gradients of the sum of ``grad * losses`` by x in its dtype, by weight and bias
        in float32 at least, each empty where it is not wanted.
    """
    N, V = x.shape[0], weight.shape[0]
    device, wide = x.device, torch.promote_types(x.dtype, torch.float32)
    losses = torch.empty(N, dtype=wide, device=device)
    by_x = torch.empty(x.shape if wanted[0] else (0,), dtype=x.dtype, device=device)
    by_weight = torch.zeros(weight.shape if wanted[1] else (0,), dtype=wide, device=device)
    by_bias = torch.zeros(V if wanted[2] else 0, dtype=wide, device=device)
    # Chunks of about equal size, in whole tiles of a matrix product.
    count = max(1, math.ceil(N * V * x.element_size() / chunk_bytes))
    rows = max(1, math.ceil(N / count / 128)) * 128
    memory = torch.empty(min(rows, N), V, dtype=x.dtype, device=device)
    for first in range(0, N, rows):
        part = slice(first, min(first + rows, N))
        logits = memory[: part.stop - first]
        if bias is None:
            torch.mm(x[part], weight.t(), out=logits)
        else:
            torch.addmm(bias, x[part], weight.t(), out=logits)
        turn(logits, targets[part], None if grad is None else grad[part], losses[part])
        if wanted[0]:
            torch.mm(logits, weight, out=by_x[part])
        if wanted[1]:
            add_product(by_weight, logits.t(), x[part])
        if wanted[2]:
            by_bias += logits.sum(0, dtype=wide)
    return losses, by_x, by_weight, by_bias


def reduced(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Losses [N], 0 where a row does not count, as ``reduction`` says."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / (targets != ignore_index).sum() if reduction == "mean" else total


def factor(grad: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Of each row's gradient, where ``grad`` is that of the reduced loss; 0 rows give no NaN."""
    if reduction == "mean":
        return grad / (targets != ignore_index).sum().clamp(min=1)
    return grad
