"""Tokenising as in the authors' release, without a CUDA extension: a baseline, not for use.

It uses timm's own loop over the backbone's blocks, `F.grid_sample` for the deformable attention,
one matrix of the distances to all codes, and a VQGAN decoder in torch's default layout with
separate norm, SiLU, convolution and nearest upsampling. It was written from the description of the
release; the weights are those of our model. Parts that are plain torch in our model too
(projectors, self-attention, token decoder) are called with nothing enabled.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vfmtok_fast import VFMTok


class ReleaseTokenizer:
    """Encodes and decodes with the weights of ``model``: float32, or TF32 if the process allows."""

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
    return part.shortcut(x) + part.conv2(F.silu(part.norm2(h)))


def attend(part: nn.Module, x: Tensor) -> Tensor:
    """Attend with one head over all positions, with the attention weights in memory."""
    h = part.norm(x)
    q, k, v = (project(h).flatten(2) for project in (part.q, part.k, part.v))
    weights = (q.transpose(1, 2) @ k / math.sqrt(q.shape[1])).softmax(dim=-1)
    return x + part.out((v @ weights.transpose(1, 2)).unflatten(2, x.shape[2:]))
