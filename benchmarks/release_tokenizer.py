"""The authors' way of tokenising without a CUDA extension, to compare with, not for use.

timm's own loop over the backbone's blocks, `F.grid_sample` for the deformable attention, distances
to all codes in one matrix, and a VQGAN decoder in torch's default layout, with norm, SiLU,
convolution and nearest upsampling as separate operations. Rewritten from its description; the
weights are those of our model. The parts that are plain torch in our model too (projectors,
self-attention, token decoder) are called with nothing enabled.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmtok_fast import VFMTok


class ReleaseTokenizer:
    """Encodes and decodes with ``model``'s weights, in float32 or TF32 as the process allows."""

    def __init__(self, model: VFMTok):
        self.model = model

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        model, backbone = self.model, self.model.backbone
        x = ((images + 1) / 2 - backbone.mean) / backbone.std
        last, maps = backbone.vit.forward_intermediates(
            x, indices=list(backbone.levels), norm=False, output_fmt="NLC"
        )
        maps[-1] = last[:, backbone.vit.num_prefix_tokens :]
        queries = model.quantizer.queries(model.region_encoder(maps)).flatten(0, 1)
        codebook = F.normalize(model.quantizer.codebook, dim=-1)
        squares = queries.square().sum(1, keepdim=True) + codebook.square().sum(1)
        return (squares - 2 * queries @ codebook.T).argmin(dim=1).view(len(images), -1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        tokens, pixels = self.model.token_decoder, self.model.pixel_decoder
        x = tokens.pixel_map(tokens.regions(self.model.quantizer.lookup(codes)))
        x = pixels.conv_in(x.contiguous())
        first, attention, second = pixels.middle
        x = block(second, attend(attention, block(first, x)))
        for level in pixels.levels:
            for part in level.blocks:
                x = block(part, x)
            if level.upsample is not None:
                x = level.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return pixels.conv_out(F.silu(pixels.norm_out(x)))


def block(part: nn.Module, x: Tensor) -> Tensor:
    h = part.conv1(F.silu(part.norm1(x)))
    shortcut = x if part.shortcut is None else part.shortcut(x)
    return shortcut + part.conv2(F.silu(part.norm2(h)))


def attend(part: nn.Module, x: Tensor) -> Tensor:
    """Attention of one head over all positions, with its weights stored in memory."""
    h = part.norm(x)
    q, k, v = (project(h).flatten(2) for project in (part.q, part.k, part.v))
    weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(dim=-1)
    return x + part.out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))
