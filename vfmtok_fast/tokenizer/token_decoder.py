"""From codes to the pixel decoder's map and the foundation model's features (section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..functional import resize_positions, through
from .attention import CausalSelfAttention
from .config import VFMTokConfig
from .layers import Linear, add_norm, are_plain

# Tokens after the patches: DINOv2's number of registers, whatever the backbone.
NUM_REGISTERS = 4


class DecoderLayer(nn.Module):
    """Pre-norm causal attention and SwiGLU."""

    def __init__(self, config: VFMTokConfig):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = CausalSelfAttention(config.dim, config.num_heads, config.decoder_dropout)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.gate_up = Linear(config.dim, 2 * config.decoder_ffn_dim)
        self.down = Linear(config.decoder_ffn_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        x, normed = add_norm(x, self.attention(self.attention_norm(x)), self.ffn_norm)
        if are_plain(self.gate_up):
            return x + self.down(self.gate_up(normed, "swiglu"))
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class TokenDecoder(nn.Module):
    """One ViT, run once per target: [regions ; class, masked patches, registers], causal."""

    def __init__(self, config: VFMTokConfig, backbone_dim: int):
        super().__init__()
        dim = config.dim
        self.pixel_grid = config.pixel_grid

        def learned(count: int) -> nn.Parameter:
            return nn.Parameter(dim**-0.5 * torch.randn(1, count, dim))

        self.proj = nn.Linear(config.codebook_dim, dim)
        self.region_position = learned(config.num_regions)
        self.class_token = learned(1)
        self.pixel_mask = learned(1)
        self.feature_mask = learned(1)
        self.registers = nn.Parameter(torch.zeros(1, NUM_REGISTERS, dim))
        # The first position is the class token's.
        self.position = learned(1 + config.feature_grid**2)
        self.pixel_norm = nn.LayerNorm(dim)
        self.feature_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_depth))
        self.grad_checkpointing = False
        self.feature_head = nn.Linear(dim, backbone_dim)
        for part in (*self.layers.modules(), self.feature_head):
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)

    def regions(self, vectors: Tensor) -> Tensor:
        """Turn code vectors [B, R, d] into the regions that both passes read, [B, R, dim]."""
        # Both passes use the pixel pass's norm here, as in the release.
        return self.pixel_norm(self.proj(vectors) + self.region_position)

    def pixel_map(self, regions: Tensor) -> Tensor:
        """Turn regions into the pixel decoder's input [B, dim, 21, 21]."""
        position = resize_positions(self.position[:, 1:], self.pixel_grid)
        patches = self._run(regions, self.pixel_mask + position, self.pixel_norm)
        return rearrange(patches, "b (y x) c -> b c y x", y=self.pixel_grid)

    def features(self, regions: Tensor) -> Tensor:
        """Turn regions into predicted foundation model features [B, 576, backbone_dim]."""
        patches = self.feature_mask + self.position[:, 1:]
        return self.feature_head(self._run(regions, patches, self.feature_norm))

    def semantic_class(self, regions: Tensor) -> Tensor:
        """Return the class token [B, dim] after the pass that predicts features.

        The class token precedes the patches and attention is causal, so the patches are left out.
        """
        R, patches = regions.shape[1], self.feature_mask[:, :0]
        return self._hidden(regions, patches, self.feature_norm)[:, R]

    def _run(self, regions: Tensor, patches: Tensor, norm: nn.LayerNorm) -> Tensor:
        first = regions.shape[1] + 1
        return self._hidden(regions, patches, norm)[:, first : first + patches.shape[1]]

    def _hidden(self, regions: Tensor, patches: Tensor, norm: nn.LayerNorm) -> Tensor:
        start = self.class_token + self.position[:, :1]
        image = norm(torch.cat([start, patches, self.registers], dim=1))
        x = torch.cat([regions, image.expand(regions.shape[0], -1, -1)], dim=1)
        return through(self.layers, x, recompute=self.grad_checkpointing)
