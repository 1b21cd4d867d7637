"""Configuration of the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..configs import check_numbers, check_positive, config_from_mapping

# The default depths of DINOv2-L; a timm backbone reads the same fractions of its own depth.
DINOV2_L_LEVELS = (5, 11, 17, 23)
# (dim, depth, heads) of the published DINOv2 models with registers: S, B, L.
DINOV2_WITH_REGISTERS = ((384, 12, 6), (768, 12, 12), (1024, 24, 16))
COUNTS = (
    *("image_size", "dim", "encoder_depth", "decoder_depth", "num_heads", "decoder_mlp_dim"),
    *("num_regions", "num_points", "codebook_size", "codebook_dim", "pixel_channels"),
)


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen vision foundation model.

    The default is DINOv2 ViT-L/14 with registers. ``timm_name`` selects any other timm ViT instead.
    Its shape is then read from timm, and of the other fields only ``levels`` applies.
    `VFMTokConfig.grid` determines how many pixels the model reads: that many of its patches per
    side.

    Args:
        dim, depth, num_heads, patch_size, num_registers: the vision transformer.
        levels: block indices whose outputs are read. At the default, a timm backbone reads the ends
            of the four quarters of its own depth.
        pretrain_grid: side of the position table in DINOv2's own file.
        position_resize: how that table is resized to the model's. "antialias" (bicubic to the size,
            with antialiasing) is how DINOv2 publishes its models with registers, including the
            release's ViT-L. "offset" (bicubic by the factor (grid + 0.1) / pretrain_grid) is the
            default of DINOv2's class. "auto" means "antialias" for the published sizes, else
            "offset".
        timm_name: name of a timm vision transformer, such as
            "vit_base_patch16_siglip_384.v2_webli".
        timm_image_size: pixels that the timm model reads; None is the grid times its patch size,
            and no other value works.
    """

    dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    patch_size: int = 14
    num_registers: int = 4
    levels: tuple[int, ...] = DINOV2_L_LEVELS
    pretrain_grid: int = 37
    position_resize: str = "auto"
    timm_name: str | None = None
    timm_image_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))
        check_positive(self, ("dim", "depth", "num_heads", "patch_size", "pretrain_grid"))
        if not self.levels or list(self.levels) != sorted(set(self.levels)) or self.levels[0] < 0:
            raise ValueError(
                f"BackboneConfig: levels must be rising block indices, got {self.levels}"
            )
        if self.position_resize not in ("auto", "antialias", "offset"):
            raise ValueError(
                "BackboneConfig: position_resize must be 'auto', 'antialias' or 'offset', "
                f"got {self.position_resize!r}"
            )
        if self.dim % self.num_heads:
            raise ValueError(
                "BackboneConfig: dim must be a multiple of num_heads, "
                f"got {self.dim} and {self.num_heads}"
            )

    @property
    def antialias_positions(self) -> bool:
        published = (self.dim, self.depth, self.num_heads) in DINOV2_WITH_REGISTERS
        if self.position_resize == "auto":
            return published and self.num_registers > 0
        return self.position_resize == "antialias"


@dataclass(frozen=True)
class VFMTokConfig:
    """Shape of the VFMTok tokenizer; the defaults are the authors' release.

    Input and output images have size ``image_size``. The backbone reads ``grid`` times its patch
    size. If that differs, the backbone resizes its input, and nothing else depends on that size.
    For example, with 336 pixels and a grid of 24 it reads 336 pixels in patches of 14, or 384 in
    patches of 16. With 256 pixels and a grid of 16 it reads 224 or 256.

    Args:
        image_size: side of the square input and output in pixels, a multiple of the 16 pixels that
            the pixel decoder makes from one position.
        backbone: the vision foundation model.
        dim, num_heads: width and heads of the region encoder and token decoder.
        encoder_depth, decoder_depth: their numbers of layers.
        decoder_dropout: dropout of the token decoder's attention weights in training. The authors
            train with 0.1; 0 is deterministic.
        decoder_mlp_dim: the width of the token decoder's SwiGLU is int(2/3 of this), rounded up to
            a multiple of 8.
        num_regions: tokens per image, a square number.
        num_points: sampling points per region, head and level.
        codebook_size, codebook_dim: number and dimension of the codes.
        pixel_channels, pixel_channel_mult: width of the pixel decoder at each resolution, from fine
            to coarse.
        commit_beta: weight of the commitment loss.
        entropy_weight: weight of the entropy loss; 0 leaves it out.
        grid: side of the backbone's map; None is ``image_size`` / 14, which must then be whole.
    """

    image_size: int = 336
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    dim: int = 512
    encoder_depth: int = 6
    decoder_depth: int = 6
    num_heads: int = 8
    decoder_dropout: float = 0.0
    decoder_mlp_dim: int = 2048
    num_regions: int = 256
    num_points: int = 4
    codebook_size: int = 16384
    codebook_dim: int = 12
    pixel_channels: int = 128
    pixel_channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    commit_beta: float = 0.25
    entropy_weight: float = 0.0
    grid: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.backbone, Mapping):
            object.__setattr__(self, "backbone", config_from_mapping(BackboneConfig, self.backbone))
        object.__setattr__(self, "pixel_channel_mult", tuple(self.pixel_channel_mult))
        check_positive(self, COUNTS)
        weights = ("commit_beta", "entropy_weight")
        check_numbers(self, {"decoder_dropout": (0, 1), **dict.fromkeys(weights, (0, math.inf))})
        if self.dim % self.num_heads:
            raise ValueError(
                "VFMTokConfig: dim must be a multiple of num_heads, "
                f"got {self.dim} and {self.num_heads}"
            )
        if math.isqrt(self.num_regions) ** 2 != self.num_regions:
            raise ValueError(
                f"VFMTokConfig: num_regions must be a square number, got {self.num_regions}"
            )
        if self.image_size % self.pixel_patch:
            raise ValueError(
                f"VFMTokConfig: image_size must be a multiple of {self.pixel_patch} (the pixel "
                f"decoder's patch, 2 to the number of its upsamplings), got {self.image_size}"
            )
        if self.grid is not None:
            check_positive(self, ("grid",))
        elif self.image_size % 14:
            raise ValueError(
                f"VFMTokConfig: image_size {self.image_size} is not a multiple of 14 and needs "
                "grid, the side of the backbone's map (16 is 256 pixels in patches of 16, or 224 "
                "of 14)"
            )
        if self.pixel_channels % 32:
            raise ValueError(
                "VFMTokConfig: pixel_channels must be a multiple of 32 (GroupNorm groups), "
                f"got {self.pixel_channels}"
            )

    @property
    def pixel_patch(self) -> int:
        """Pixels per side that the pixel decoder makes from one position of its input: 16."""
        return 2 ** (len(self.pixel_channel_mult) - 1)

    @property
    def pixel_grid(self) -> int:
        """Side of the map that the pixel decoder reads: 21."""
        return self.image_size // self.pixel_patch

    @property
    def feature_grid(self) -> int:
        """Side of the foundation model's map: 24."""
        return self.image_size // 14 if self.grid is None else self.grid

    @property
    def encoder_ffn_dim(self) -> int:
        return min(4 * self.dim, 1024)

    @property
    def decoder_ffn_dim(self) -> int:
        return (int(self.decoder_mlp_dim * 2 / 3) + 7) // 8 * 8
