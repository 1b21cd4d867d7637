"""Layers of the tokenizer that ops compute, alone or several at once."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..functional import is_unhooked


class Linear(nn.Linear):
    """`nn.Linear` computed by `ops.linear`."""

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        return ops.linear(x, self.weight, self.bias, activation=activation)


class Conv(nn.Conv2d):
    """`nn.Conv2d` with stride 1 that keeps the size of the map."""

    def __init__(self, channels_in: int, channels_out: int, size: int):
        super().__init__(channels_in, channels_out, size, padding=size // 2)


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` with VQGAN's 32 groups and eps."""

    def __init__(self, channels: int):
        super().__init__(32, channels, eps=1e-6)


def are_plain(*layers: nn.Module) -> bool:
    """Whether an op may compute these layers from their weights, without calling them.

    The check compares exact classes: an adapter, a pruned or hooked layer, or any other in a
    layer's place must be called.
    """
    return all(map(_is_plain, layers))


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) not in (Linear, Conv, GroupNorm, nn.LayerNorm) or not is_unhooked(layer):
        return False
    if type(layer) is Linear:
        return layer.weight is not None
    if layer.weight is None or layer.bias is None:
        return False
    if type(layer) is not Conv:
        return True
    same = tuple(size // 2 for size in layer.kernel_size)
    has = layer.padding_mode, layer.padding, layer.stride, layer.dilation
    return has == ("zeros", same, (1, 1), (1, 1))


def weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a plain layer."""
    return layer.weight, layer.bias


def add_norm(x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the sum ``x + branch`` and its norm."""
    if are_plain(norm):
        return ops.add_norm(x, branch, *weights(norm), eps=norm.eps)
    return x + branch, norm(x + branch)


def norm_silu(x: Tensor, norm: nn.Module) -> Tensor:
    """SiLU of a normalised map [B, C, H, W]."""
    if are_plain(norm):
        return ops.group_norm_silu(x, *weights(norm), norm.num_groups, norm.eps)
    return F.silu(norm(x))


def upsampled(x: Tensor, conv: nn.Module) -> Tensor:
    """A convolution of a map [B, C, H, W] that is enlarged twofold by nearest neighbours."""
    if are_plain(conv):
        return ops.upsample_conv(x, *weights(conv))
    return conv(F.interpolate(x, scale_factor=2, mode="nearest"))
