"""Discriminators: map images [B, 3, S, S] in about [-1, 1] to logits [B, n], high if real."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

from ..checkpoint import read_tensors
from ..hub import load_checked
from ..tokenizer.backbone import IMAGENET_MEAN, IMAGENET_STD

# DINO's ViT-S/16.
SIDE, DIM, DEPTH, NUM_HEADS, PATCH = 224, 384, 12, 6, 16
# Features are taken after the position embedding and after these blocks.
BLOCKS = (2, 5, 8, 11)
# Maximum number of images that share the statistics of a norm.
GROUP = 8


class GroupedBatchNorm(nn.Module):
    """Batch norm over at most 8 images at a time, without running statistics.

    A batch is split into ceil(B / 8) groups of sizes as equal as possible. The authors' code does
    the same if the number of groups divides the batch, and fails otherwise.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [B, C, L]."""
        normed = []
        for group in x.tensor_split(math.ceil(len(x) / GROUP)):
            variance, mean = torch.var_mean(group, dim=(0, 2), correction=0, keepdim=True)
            normed.append((group - mean) * torch.rsqrt(variance + 1e-6))
        return torch.cat(normed) * self.weight[:, None] + self.bias[:, None]


class Residual(nn.Module):
    def __init__(self, fn: nn.Module):
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) / math.sqrt(2)


def _block(kernel_size: int) -> nn.Sequential:
    # Positions in row order form a ring: the last one is a neighbour of the first.
    convolution = nn.Conv1d(
        DIM, DIM, kernel_size, padding=kernel_size // 2, padding_mode="circular"
    )
    return nn.Sequential(spectral_norm(convolution), GroupedBatchNorm(DIM), nn.LeakyReLU(0.2))


def _head() -> nn.Sequential:
    return nn.Sequential(_block(1), Residual(_block(9)), spectral_norm(nn.Conv1d(DIM, 1, 1)))


class DinoDiscriminator(nn.Module):
    """Heads of three convolutions on five maps of a frozen DINO ViT-S/16, with random weights.

    Logits are [B, 5 * 196]. In training mode each call runs one power iteration of the spectral
    norms and, with probability ``crop``, cuts the same random 224-pixel square out of every image.
    Otherwise, and always in eval mode, images are resized to 224.

    Args:
        crop: probability of a crop if images are larger than 224, drawn from torch's CPU generator.

    Source: Projected GAN, arXiv 2111.01007, and StyleGAN-T, arXiv 2301.09515, as in VFMTok's
    release.
    """

    def __init__(self, crop: float = 0.5):
        super().__init__()
        # timm imports torchvision and with it Triton, which importing this package should not.
        from timm.models import VisionTransformer

        self.crop = crop
        # The release uses the tanh form of GELU, although DINO was trained with the exact one.
        self.vit = VisionTransformer(
            img_size=SIDE, patch_size=PATCH, embed_dim=DIM, depth=DEPTH, num_heads=NUM_HEADS,
            num_classes=0, global_pool="", act_layer=partial(nn.GELU, approximate="tanh"),
        ).requires_grad_(False)  # fmt: skip
        self.heads = nn.ModuleList(_head() for _ in range(1 + len(BLOCKS)))
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        # Map [-1, 1] to ImageNet's statistics in one step.
        self.register_buffer("scale", (0.5 / std).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", ((0.5 - mean) / std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.read(self._fitted(images * self.scale + self.shift))
        # The heads are a small part of the work; their norms and power iterations need float32.
        with torch.autocast(images.device.type, enabled=False):
            dtype = self.heads[0][2].weight_orig.dtype
            logits = [head(x.to(dtype)) for head, x in zip(self.heads, maps, strict=True)]
        return torch.cat(logits, dim=1).flatten(1)

    def read(self, images: Tensor) -> list[Tensor]:
        """Map normalised 224 x 224 images to [B, 384, 196]: each patch plus the class token."""
        vit = self.vit
        x = vit._pos_embed(vit.patch_embed(images))
        found = [x]
        for number, block in enumerate(vit.blocks):
            x = block(x)
            if number in BLOCKS:
                found.append(x)
        return [(x[:, 1:] + x[:, :1]).transpose(1, 2) for x in found]

    def _fitted(self, images: Tensor) -> Tensor:
        side = images.shape[-1]
        may_crop = self.training and side > SIDE and self.crop > 0
        if may_crop and float(torch.rand((), device="cpu")) < self.crop:
            top, left = torch.randint(side - SIDE + 1, (2,), device="cpu").tolist()
            return images[:, :, top : top + SIDE, left : left + SIDE]
        if side == SIDE:
            return images
        # Compute area means as two matrix products: on a GPU the gradient of area interpolation
        # sums in no fixed order.
        with torch.autocast(images.device.type, enabled=False):
            eye = torch.eye(side, dtype=images.dtype, device=images.device)
            means = F.interpolate(eye[None], size=SIDE, mode="area")[0]  # [side, SIDE]
            return means.T @ images @ means

    @classmethod
    def from_files(
        cls,
        dino_vits16: str | Path | Mapping,
        heads: str | Path | Mapping | None = None,
        crop: float = 0.5,
    ) -> Self:
        """Read the weights.

        Args:
            dino_vits16: DINO's own ``dino_deitsmall16_pretrain.pth``, or the mapping in it.
            heads: a file or mapping with ``heads.*`` to continue from, such as the authors'
                checkpoint (under "discriminator"); None starts the heads from random weights.
            crop: see the class.

        Raises:
            ValueError: entries are missing, extra, misshapen or NaN (all are named), or the file is
                not a checkpoint.
            FileNotFoundError: no such file.
        """
        model = cls(crop)
        found = read_tensors(dino_vits16, ("state_dict", "teacher", "model"), "discriminator: DINO")
        load_checked(model.vit, found, "discriminator: DINO ViT-S/16")
        # As in the release; a bias that all keys share cancels in the softmax.
        for block in model.vit.blocks:
            block.attn.qkv.bias.data[DIM : 2 * DIM] = 0
        if heads is not None:
            found = read_tensors(heads, ("discriminator", "state_dict"), "discriminator: heads")
            found = {k[6:]: v for k, v in found.items() if k.startswith("heads.")}
            load_checked(model.heads, found, "discriminator: heads")
        return model


class PatchDiscriminator(nn.Module):
    """PatchGAN: a convolutional network in which each logit sees 70 x 70 pixels.

    It needs no pretrained weights and is meant for small runs. The release has one but cannot run
    it.

    Args:
        width: channels of the first layer.

    Source: pix2pix, arXiv 1611.07004.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for factor, stride in ((1, 2), (2, 2), (4, 1)):
            before, after = factor * width, 2 * factor * width
            layers += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.BatchNorm2d(after, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).flatten(1)
