"""The convolutional decoder of VQGAN: from a 21x21 map to 336x336 pixels."""

from __future__ import annotations

from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from .. import ops
from ..functional import through
from .attention import attend
from .config import VFMTokConfig
from .layers import Conv, GroupNorm, are_plain, norm_silu, upsampled, weights


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = GroupNorm(channels_in)
        self.conv1 = Conv(channels_in, channels_out, 3)
        self.norm2 = GroupNorm(channels_out)
        self.conv2 = Conv(channels_out, channels_out, 3)
        self.shortcut = None
        if channels_in != channels_out:
            self.shortcut = Conv(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.norm1, self.conv1, self.norm2, self.conv2]
        layers += [] if self.shortcut is None else [self.shortcut]
        norm, other = self.norm1, self.norm2
        if are_plain(*layers) and (norm.num_groups, norm.eps) == (other.num_groups, other.eps):
            return ops.residual_block(
                x, *map(weights, layers), num_groups=norm.num_groups, eps=norm.eps
            )
        h = self.conv2(norm_silu(self.conv1(norm_silu(x, self.norm1)), self.norm2))
        return h + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nn.Module):
    """Attention with one head over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = GroupNorm(channels)
        self.q = Conv(channels, channels, 1)
        self.k = Conv(channels, channels, 1)
        self.v = Conv(channels, channels, 1)
        self.out = Conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        h = rearrange(self.norm(x), "b c y x -> b 1 (y x) c").contiguous()
        q, k, v = (_rows(project, h, height) for project in (self.q, self.k, self.v))
        # One head over all pixels.
        mixed = _rows(self.out, attend(q, k, v), height)
        return x + rearrange(mixed, "b 1 (y x) c -> b c y x", y=height)


def _rows(conv: nn.Module, rows: Tensor, height: int) -> Tensor:
    """Apply a 1x1 convolution to the pixels [B, 1, height * width, C] of a map."""
    if are_plain(conv):  # A linear layer over the channels.
        return ops.linear(rows, conv.weight.flatten(1), conv.bias)
    made = conv(rearrange(rows, "b 1 (y x) c -> b c y x", y=height))
    return rearrange(made, "b c y x -> b 1 (y x) c")


class Level(nn.Module):
    """Two residual blocks at one resolution; except at the last, also nearest x2 and a conv."""

    def __init__(self, channels_in: int, channels_out: int, upsample: bool):
        super().__init__()
        self.blocks = nn.Sequential(
            ResidualBlock(channels_in, channels_out), ResidualBlock(channels_out, channels_out)
        )
        self.upsample = Conv(channels_out, channels_out, 3) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x if self.upsample is None else upsampled(x, self.upsample)


class PixelDecoder(nn.Module):
    def __init__(self, config: VFMTokConfig):
        super().__init__()
        widths = [config.pixel_channels * m for m in reversed(config.pixel_channel_mult)]
        self.conv_in = Conv(config.dim, widths[0], 3)
        self.middle = nn.Sequential(
            ResidualBlock(widths[0], widths[0]),
            SpatialAttention(widths[0]),
            ResidualBlock(widths[0], widths[0]),
        )
        self.levels = nn.Sequential(
            *(
                Level(before, width, upsample=i < len(widths) - 1)
                for i, (before, width) in enumerate(pairwise([widths[0], *widths]))
            )
        )
        sides = [config.image_size >> i for i in reversed(range(len(widths)))]
        self.largest_map = max(width * side**2 for width, side in zip(widths, sides, strict=True))
        self.norm_out = GroupNorm(widths[-1])
        self.conv_out = Conv(widths[-1], 3, 3)
        self.grad_checkpointing = False

    def fitting(self, nbytes: int, itemsize: int) -> int:
        """Return how many images have maps that fit into ``nbytes``, at least one."""
        # A block holds its input, the first convolution's result, that result normalised and the
        # second convolution's result; the level also holds its input.
        return max(1, nbytes // (5 * self.largest_map * itemsize))

    def forward(self, x: Tensor) -> Tensor:
        """Turn a map [B, dim, 21, 21] into images [B, 3, 336, 336], about [-1, 1], not clamped."""
        # Channels last: convolutions and norms keep that format from here on.
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        x = through([*self.middle, *self.levels], x, recompute=self.grad_checkpointing)
        return self.conv_out(norm_silu(x, self.norm_out))
