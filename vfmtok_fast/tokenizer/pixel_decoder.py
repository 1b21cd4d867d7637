"""The convolutional decoder of VQGAN: from a 21x21 map to 336x336 pixels."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from .. import ops
from ..functional import through
from .attention import attend
from .config import VFMTokConfig


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def pair(module: nn.Module) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = group_norm(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = None if isinstance(self.shortcut, nn.Identity) else pair(self.shortcut)
        return ops.residual_block(
            x, *map(pair, (self.norm1, self.conv1, self.norm2, self.conv2)), shortcut,
            num_groups=self.norm1.num_groups, eps=self.norm1.eps,
        )  # fmt: skip


class SpatialAttention(nn.Module):
    """Attention with one head over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # 1x1 convolutions are linear layers over the channels.
        h = rearrange(self.norm(x), "b c y x -> b 1 (y x) c").contiguous()
        q, k, v = (_rows(project, h) for project in (self.q, self.k, self.v))
        # One head over all pixels.
        mixed = _rows(self.out, attend(q, k, v))
        return x + rearrange(mixed, "b 1 (y x) c -> b c y x", y=x.shape[2])


def _rows(conv: nn.Conv2d, rows: Tensor) -> Tensor:
    """Apply a 1x1 convolution to rows [..., C]."""
    return ops.linear(rows, conv.weight.flatten(1), conv.bias)


class Level(nn.Module):
    """Two residual blocks at one resolution; except at the last, also nearest x2 and a conv."""

    def __init__(self, channels_in: int, channels_out: int, upsample: bool):
        super().__init__()
        self.blocks = nn.Sequential(
            ResidualBlock(channels_in, channels_out), ResidualBlock(channels_out, channels_out)
        )
        self.upsample = nn.Conv2d(channels_out, channels_out, 3, padding=1) if upsample else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        if self.upsample is None:
            return x
        return ops.upsample_conv(x, *pair(self.upsample))


class PixelDecoder(nn.Module):
    def __init__(self, config: VFMTokConfig):
        super().__init__()
        widths = [config.pixel_channels * m for m in reversed(config.pixel_channel_mult)]
        self.conv_in = nn.Conv2d(config.dim, widths[0], 3, padding=1)
        self.middle = nn.Sequential(
            ResidualBlock(widths[0], widths[0]),
            SpatialAttention(widths[0]),
            ResidualBlock(widths[0], widths[0]),
        )
        self.levels = nn.Sequential(
            *(
                Level(before, width, upsample=i < len(widths) - 1)
                for i, (before, width) in enumerate(
                    zip([widths[0], *widths[:-1]], widths, strict=True)
                )
            )
        )
        sides = [config.image_size >> i for i in reversed(range(len(widths)))]
        self.largest_map = max(width * side**2 for width, side in zip(widths, sides, strict=True))
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
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
        norm = self.norm_out
        return self.conv_out(ops.group_norm_silu(x, *pair(norm), norm.num_groups, norm.eps))
