"""The convolutional decoder of VQGAN: a 21x21 map to 336x336 pixels."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import VFMTokConfig


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


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
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # One head over all pixels.
        q, k, v = (
            rearrange(project(h), "b c y x -> b 1 (y x) c") for project in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(mixed, "b 1 (y x) c -> b c y x", y=x.shape[2]))


class Level(nn.Module):
    """Two residual blocks at one resolution; but for the last, nearest x2 and a convolution."""

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
        return self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))


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
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, dim, 21, 21] to images [B, 3, 336, 336], about [-1, 1], not clamped."""
        x = self.levels(self.middle(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))
