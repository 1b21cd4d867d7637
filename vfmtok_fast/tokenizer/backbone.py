"""The frozen vision foundation model, created with timm and read at several depths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..errors import first_line
from ..hub import register_constant
from . import vit as plain
from .config import DINOV2_L_LEVELS, BackboneConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A frozen ViT, which is always in eval mode and never trained.

    It reads ``image_size`` pixels, the grid times its patch size, and resizes images of another
    size.

    Args:
        config: which model.
        grid: side of the feature map that the rest of the tokenizer expects.

    Raises:
        ValueError: a timm name that is unknown, is no plain ViT, or has a map other than ``grid``
            at the requested number of pixels.
    """

    def __init__(self, config: BackboneConfig, grid: int):
        super().__init__()
        mean, std = IMAGENET_MEAN, IMAGENET_STD
        if config.timm_name is None:
            self.vit = _dinov2(config, grid)
        else:
            self.vit = _timm_vit(config, grid)
            mean, std = self.vit.pretrained_cfg["mean"], self.vit.pretrained_cfg["std"]
        name = config.timm_name or "DINOv2"
        patch_embed = self.vit.patch_embed
        if tuple(patch_embed.grid_size) != (grid, grid):
            (height, width), pixels = patch_embed.grid_size, patch_embed.img_size
            raise ValueError(
                f"BackboneConfig: the decoder serves {grid}x{grid} feature maps, but {name} gives "
                f"{height}x{width} from {pixels[0]}x{pixels[1]} pixels; choose "
                f"timm_image_size={grid * (pixels[0] // height)}, another grid or another model"
            )
        depth = len(self.vit.blocks)
        self.levels = config.levels
        if config.timm_name is not None and self.levels == DINOV2_L_LEVELS:
            self.levels = tuple(depth * (i + 1) // 4 - 1 for i in range(4))
        if self.levels[-1] >= depth:
            raise ValueError(
                f"BackboneConfig: levels must be below {name}'s depth {depth}, got {self.levels}"
            )
        self.dim = self.vit.embed_dim
        self.image_size = patch_embed.img_size[0]
        register_constant(self, "mean", torch.tensor(mean, device="cpu").view(3, 1, 1))
        register_constant(self, "std", torch.tensor(std, device="cpu").view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Backbone:
        return super().train(False)

    @property
    def is_plain(self) -> bool:
        """Whether `vit.read` computes what the ViT does; its layers may have been replaced.

        Under torch.compile the answer is that of the moment of compiling.
        """
        return plain.is_plain(self.vit)

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Turn images [B, 3, S, S] in [-1, 1] into one map [B, grid * grid, dim] per level.

        S may be any size. The output of the last block passes through the final LayerNorm; those of
        earlier blocks do not.
        """
        is_plain = self.is_plain
        cuts_plainly = is_plain and plain.cuts_plainly(self.vit.patch_embed)
        if cuts_plainly and images.shape[-1] == self.image_size:
            projection = self.vit.patch_embed.proj
            patches = ops.patch_embed(
                images, self.mean.flatten(), self.std.flatten(), projection.weight, projection.bias
            )
            return plain.read(self.vit, patches, self.levels)
        x = (images.clamp(-1, 1) + 1) / 2
        if x.shape[-1] != self.image_size:
            # torch has no antialiased resize in half precision on a CPU.
            wide = x if x.dtype == torch.float64 else x.float()
            wide = F.interpolate(wide, size=self.image_size, mode="bicubic", antialias=True)
            x = wide.clamp(0, 1).to(x.dtype)
        x = ((x - self.mean) / self.std).to(next(self.vit.patch_embed.parameters()).dtype)
        if is_plain:
            return plain.read(self.vit, self.vit.patch_embed(x), self.levels)
        last, maps = self.vit.forward_intermediates(
            x, indices=list(self.levels), norm=False, output_fmt="NLC"
        )
        if self.levels[-1] == len(self.vit.blocks) - 1:
            maps[-1] = last[:, self.vit.num_prefix_tokens :]
        return maps


def _dinov2(config: BackboneConfig, grid: int) -> nn.Module:
    # timm imports torchvision, which imports Triton; importing the package must not do that.
    from timm.models import VisionTransformer

    return VisionTransformer(
        img_size=grid * config.patch_size,
        patch_size=config.patch_size,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.num_heads,
        reg_tokens=config.num_registers,
        no_embed_class=True,
        init_values=1e-5,
        num_classes=0,
        global_pool="",
    )


def _timm_vit(config: BackboneConfig, grid: int) -> nn.Module:
    import timm

    name, size = config.timm_name, config.timm_image_size
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.split('.')[0].split('_')[-1]}*")[:3]
        hint = f", such as {', '.join(similar)}" if similar else ""
        raise ValueError(f"BackboneConfig: timm {timm.__version__} has no model {name!r}{hint}")
    options = {"num_classes": 0, "global_pool": ""}
    if size is not None:
        options["img_size"] = size
    refusal = f"BackboneConfig: timm_name must be a plain ViT with square 2-D maps, got {name!r}"
    try:
        vit = timm.create_model(name, **options)
    # Models that are no ViT do not accept these options, and each fails in its own way.
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"{refusal} ({first_line(error)})") from error
    needed = ("blocks", "patch_embed", "forward_intermediates", "num_prefix_tokens", "embed_dim")
    missing = [part for part in needed if not hasattr(vit, part)]
    if not missing and getattr(vit.patch_embed, "grid_size", None) is None:
        missing = ["patch_embed.grid_size"]
    if missing:
        raise ValueError(f"{refusal}, which lacks {', '.join(missing)}")
    has = tuple(vit.patch_embed.grid_size)
    if size is None and has != (grid, grid) and hasattr(vit, "set_input_size"):
        # When the published position table is loaded, it is resized to this size, as in timm.
        side = grid * (vit.patch_embed.img_size[0] // has[0])
        vit.set_input_size(img_size=(side, side))
    return vit
