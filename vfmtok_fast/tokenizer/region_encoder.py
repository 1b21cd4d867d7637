"""From the foundation model's maps to region features (VFMTok section 3.1)."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..functional import through
from ..hub import register_constant
from .attention import CausalSelfAttention
from .config import VFMTokConfig
from .layers import Linear, add_norm, are_plain


class Projector(nn.Sequential):
    """Projects the backbone width to the model width; there is one per level."""

    def __init__(self, backbone_dim: int, dim: int):
        super().__init__(
            Linear(backbone_dim, dim, bias=False),
            nn.LayerNorm(dim),
            nn.ReLU(),
            Linear(dim, dim, bias=False),
            nn.LayerNorm(dim),
        )


class DeformableAttention(nn.Module):
    """Each region samples a few learned locations of every level around its reference point."""

    def __init__(self, dim: int, num_heads: int, num_levels: int, num_points: int):
        super().__init__()
        self.shape = (num_heads, num_levels, num_points)
        samples = math.prod(self.shape)
        self.offsets = Linear(dim, 2 * samples)
        self.weights = Linear(dim, samples)
        self.value = Linear(dim, dim)
        self.out = Linear(dim, dim)

        # As in Deformable DETR: head h looks along direction h, point p at distance p + 1.
        angle = torch.arange(num_heads) * (2 * math.pi / num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        reach = torch.arange(1, num_points + 1).view(1, 1, -1, 1)
        star = (direction.view(num_heads, 1, 1, 2) * reach).expand(*self.shape, 2)
        nn.init.zeros_(self.offsets.weight)
        self.offsets.bias.data.copy_(star.flatten())
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        for projection in (self.value, self.out):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        spatial_shapes: tuple[tuple[int, int], ...],
        reference_points: Tensor,
    ) -> Tensor:
        """query [B, R, C], memory [B, S, C], reference_points [1, R, L, 2] to [B, R, C]."""
        value = self.value(memory).unflatten(-1, (self.shape[0], -1))
        sampled = ops.deformable_sample(
            value,
            spatial_shapes,
            # Under autocast the projections have another dtype than the memory.
            reference_points.to(value.dtype),
            self.offsets(query).unflatten(-1, (*self.shape, 2)),
            self.weights(query).unflatten(-1, (self.shape[0], -1)),
        )
        return self.out(sampled)


class RegionLayer(nn.Module):
    """Deformable cross-attention, causal self-attention, feed-forward; post-norm."""

    def __init__(self, config: VFMTokConfig):
        super().__init__()
        dim, levels = config.dim, len(config.backbone.levels)
        self.cross_attention = DeformableAttention(dim, config.num_heads, levels, config.num_points)
        self.cross_norm = nn.LayerNorm(dim)
        self.self_attention = CausalSelfAttention(dim, config.num_heads)
        self.self_norm = nn.LayerNorm(dim)
        self.up = Linear(dim, config.encoder_ffn_dim)
        self.down = Linear(config.encoder_ffn_dim, dim)
        self.ffn_norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, position: Tensor, *sources) -> Tensor:
        x = add_norm(x, self.cross_attention(x + position, *sources), self.cross_norm)[1]
        # The release adds the position to the values as well.
        x = add_norm(x, self.self_attention(x + position), self.self_norm)[1]
        hidden = self.up(x, "relu") if are_plain(self.up) else F.relu(self.up(x))
        return add_norm(x, self.down(hidden), self.ffn_norm)[1]


class RegionEncoder(nn.Module):
    """Learned region queries that gather irregular regions of the maps."""

    def __init__(self, config: VFMTokConfig, backbone_dim: int):
        super().__init__()
        dim, levels = config.dim, len(config.backbone.levels)
        self.spatial_shapes = ((config.feature_grid, config.feature_grid),) * levels
        # Projectors and layers start as copies of one, like the release's.
        projector, layer = Projector(backbone_dim, dim), RegionLayer(config)
        self.projectors = nn.ModuleList(copy.deepcopy(projector) for _ in range(levels))
        self.level_norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(levels))
        self.regions = nn.Parameter(dim**-0.5 * torch.randn(1, config.num_regions, dim))
        self.position = nn.Parameter(dim**-0.5 * torch.randn(1, config.num_regions, dim))
        self.input_norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(config.encoder_depth))
        self.grad_checkpointing = False

        # Centres of a square grid over the image, row by row, the same for every level.
        side = math.isqrt(config.num_regions)
        centre = (torch.arange(side, device="cpu") + 0.5) / side
        y, x = torch.meshgrid(centre, centre, indexing="ij")
        points = torch.stack([x, y], dim=-1).view(1, -1, 1, 2).repeat(1, 1, levels, 1)
        register_constant(self, "reference_points", points)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Turn one map [B, S_l, backbone_dim] per level into region features [B, R, dim]."""
        x, memory = self.prepare(maps)
        sources = (memory, self.spatial_shapes, self.reference_points)
        return through(self.layers, x, self.position, *sources, recompute=self.grad_checkpointing)

    def prepare(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the first layer's input: regions [B, R, dim], pixels of all levels [B, S, dim]."""
        # A backbone may have another dtype than what follows it.
        maps = [level.to(self.regions.dtype) for level in maps]
        levels = zip(maps, self.projectors, self.level_norms, strict=True)
        memory = torch.cat([norm(project(level)) for level, project, norm in levels], dim=1)
        # Not len(), which torch.export would take for a constant.
        return self.input_norm(self.regions).expand(memory.shape[0], -1, -1), memory

    def sampling_points(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return where the last layer samples, for display.

        Returns:
            Locations [B, R, H, L, P, 2], (x, y) in [0, 1] of the image or beyond it, and their
            weights [B, R, H, L, P], which sum to 1 per region and head.
        """
        x, memory = self.prepare(maps)
        sources = (memory, self.spatial_shapes, self.reference_points)
        x = through(self.layers[:-1], x, self.position, *sources)
        attention, query = self.layers[-1].cross_attention, x + self.position
        offsets = attention.offsets(query).unflatten(-1, (*attention.shape, 2))
        # Filled on the device, because a captured graph cannot copy numbers from the host.
        sides = [offsets.new_full((1,), side) for h, w in self.spatial_shapes for side in (w, h)]
        size = torch.cat(sides).view(-1, 1, 2)
        weights = attention.weights(query).unflatten(-1, (attention.shape[0], -1)).softmax(-1)
        reference = self.reference_points[:, :, None, :, None]
        return reference + offsets / size, weights.unflatten(-1, attention.shape[1:])
