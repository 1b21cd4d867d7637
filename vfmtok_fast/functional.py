"""Functions that the models and the references of several ops share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def through(
    layers: Iterable[Callable[..., Tensor]], x: Tensor, *others: object, recompute: bool = False
) -> Tensor:
    """Apply ``layers`` to x one after another; each also receives ``others``.

    ``recompute`` keeps only the input of each layer for the backward pass (gradient checkpointing).
    """
    for layer in layers:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(layer, x, *others, use_reentrant=False)
        else:
            x = layer(x, *others)
    return x


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling ``module`` runs the forward pass of its class and nothing else."""
    # Asked of every layer at every call.
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension: float32 up to the product, then x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return wide.to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last dimension in at least float32, rounded once to ``dtype``."""
    if dtype == weight.dtype == x.dtype:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)
    return normed.to(dtype)


def modulated(x: Tensor, shift: Tensor, gain: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights times ``gain`` plus ``shift``: at least float32, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (F.layer_norm(x.to(wide), x.shape[-1:], eps=eps) * gain + shift).to(x.dtype)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Apply rotary position embedding to interleaved pairs of x [..., D].

    ``table`` [..., D / 2, 2] holds cosines and sines; x and table broadcast.
    """
    cos, sin = table.unbind(-1)
    wide = x if x.dtype == torch.float64 else x.float()
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def guided_logits(
    logits: Tensor, uncond_logits: Tensor | None, cfg_scale: float | Tensor
) -> Tensor:
    """Apply classifier-free guidance in at least float32; none without ``uncond_logits``."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(dtype)
    if uncond_logits is None:
        return logits
    uncond_logits = uncond_logits.to(dtype)
    return uncond_logits + cfg_scale * (logits - uncond_logits)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set logits [B, V] outside the ``top_k`` largest, then outside the ``top_p`` nucleus, to -inf.

    All ties at the top-k threshold are kept. The nucleus ends with the first code that takes the
    cumulative probability past ``top_p``; of equal logits the lower code counts first.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        # The mass before a code decides, so the code that crosses top_p is kept.
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before > top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits


def upsampling_kernel(weight: Tensor) -> Tensor:
    """Fuse nearest x2 and a 3x3 convolution into the kernel of one transposed convolution.

    Args:
        weight: [O, C, 3, 3], of the 3x3 convolution, which has padding 1.

    Returns:
        [C, O, 4, 4], channels last, for stride 2 and padding 1; sums of up to four weights, taken
        in at least float32.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    # Along each side, the flipped kernel is convolved with the box of two ones that repeats a
    # pixel, that is, added to itself shifted by one. Sums, not a matrix product, which could round
    # to TF32.
    wide = wide.flip(2, 3)
    wide = F.pad(wide, (0, 1)) + F.pad(wide, (1, 0))
    wide = F.pad(wide, (0, 0, 0, 1)) + F.pad(wide, (0, 0, 1, 0))
    return wide.to(weight.dtype).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def resize_positions(table: Tensor, grid: int, *, antialias: bool = False) -> Tensor:
    """Resize a square position table by bicubic interpolation with align_corners=False.

    Args:
        table: [1, side * side, C].
        grid: the new side.
        antialias: False scales by (grid + 0.1) / side, which shifts the coordinates slightly, as
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
        # torch's kernel uses one thread per pixel, which loops over all channels.
        image = _resized_by_sides(image, (grid + 0.1) / side)
    elif antialias:
        image = F.interpolate(image, size=(grid, grid), mode="bicubic", antialias=True)
    else:
        image = F.interpolate(image, scale_factor=(grid + 0.1) / side, mode="bicubic")
    assert image.shape[-1] == grid
    return rearrange(image, "1 c y x -> 1 (y x) c")


def _resized_by_sides(image: Tensor, scale: float) -> Tensor:
    """Compute bicubic `F.interpolate` of a square image [1, C, S, S], one side after the other.

    It sums elementwise products in at least float32, which no setting rounds to TF32. It uses
    neither the host nor constants, so that CUDA graphs and torch.compile can handle it.
    """
    wide = image if image.dtype == torch.float64 else image.float()
    side = image.shape[-1]
    # The resize of one side as a matrix, made by resizing unit vectors: [new, S].
    units = torch.eye(side, dtype=wide.dtype, device=wide.device).view(1, side, side, 1)
    rows = F.interpolate(units, scale_factor=(scale, 1.0), mode="bicubic")[0, :, :, 0].T
    # Channels last, like the table.
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
        x, weight, targets, bias: as in `ops.linear_cross_entropy`.
        grad: [N], factors of the rows' gradients, or None for 1.
        wanted: which gradients to compute: of x, weight and bias.
        chunk_bytes: size of the logits that are in memory at a time.
        turn: ``(logits, targets, factors, losses)`` writes the losses, and where any gradient is
            wanted replaces the logits with the gradients of the losses.
        add_product: ``(sums, a, b)`` adds a @ b to ``sums``, which are at least float32.

    Returns:
        Losses [N]; then the gradients of the sum of ``grad * losses`` with respect to x, in its
        dtype, and to weight and bias, in at least float32, each empty where it is not wanted.
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
    """Reduce losses [N], which are 0 for rows that do not count, as ``reduction`` says."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / (targets != ignore_index).sum() if reduction == "mean" else total


def factor(grad: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """Return the factor of the rows' gradients, given the gradient of the reduced loss.

    If no row counts, this causes no NaN.
    """
    if reduction == "mean":
        return grad / (targets != ignore_index).sum().clamp(min=1)
    return grad


class _FirstOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad: Tensor, anchor: Tensor, message: str) -> Tensor:
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *unused: Tensor):
        raise NotImplementedError(ctx.message)


def first_derivatives_only(message: str) -> Callable[[Callable], Callable]:
    """Decorate a backward pass that has no derivatives itself.

    Its gradients raise NotImplementedError if they are differentiated. With ``create_graph=True``
    they would otherwise look like constants, and a gradient penalty would have no effect.
    """

    def decorate(backward: Callable) -> Callable:
        def once(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                made = backward(ctx, *grads)
            made = made if isinstance(made, tuple) else (made,)
            if not torch.is_grad_enabled():  # The usual backward pass, without create_graph.
                return made
            anchor = torch.zeros((), device="cpu", requires_grad=True)
            return tuple(
                _FirstOnly.apply(grad, anchor, message) if isinstance(grad, Tensor) else grad
                for grad in made
            )

        return once

    return decorate
