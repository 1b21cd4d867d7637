"""Write an untrained emoji tokenizer with a better initialisation than random noise.

    python examples/emoji/start.py FOUNDATION.pth PICTURES OUT

VFMTok learns positions and queries from noise, for which the authors' 50 epochs of ImageNet leave
enough time. Here

- regions and patches start with the same table of sines (their grids are the same), and keys start
  equal to queries, so that a patch first attends to the region at its own place;
- queries start as the directions in which regions differ from image to image (their principal
  components, whitened), and codes start as queries, so that codes distinguish images, not places.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from pictures import read
from torch import Tensor

from vfmtok_fast import VFMTok, VFMTokConfig
from vfmtok_fast.checkpoint import load_backbone
from vfmtok_fast.configs import config_from_mapping

CONFIG = Path(__file__).with_name("tokenizer.json")
# Amplitude of the table, about that of the codes that it is added to.
AMPLITUDE = 0.5
# Number of images whose regions provide the initial queries.
SEEN = 256


def sines(side: int, dim: int) -> Tensor:
    """Positions of a square grid [side * side, dim]: sines and cosines of row and column."""
    rates = 0.5 * torch.pi * 2.0 ** -torch.linspace(0, 3, dim // 4)
    waves = torch.arange(side)[:, None] * rates
    line = torch.cat([waves.sin(), waves.cos()], dim=1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return AMPLITUDE * torch.cat([rows, columns], dim=-1).flatten(0, 1)


@torch.no_grad()
def place(model: VFMTok) -> None:
    decoder = model.token_decoder
    decoder.region_position.copy_(sines(model.config.feature_grid, model.config.dim)[None])
    decoder.position[:, 1:] = decoder.region_position
    for layer in decoder.layers:
        layer.attention.k.weight.copy_(layer.attention.q.weight)


@torch.no_grad()
def look(model: VFMTok, pictures: Tensor) -> None:
    """Initialise queries and codes from uint8 images [N, 3, 128, 128]."""
    rows = torch.randperm(len(pictures))[:SEEN]
    images = F.interpolate(pictures[rows] / 127.5 - 1, model.config.image_size, mode="area")
    regions = model.region_encoder(model.backbone(images))
    differences = (regions - regions.mean(0)).flatten(0, 1)
    _, spread, directions = torch.linalg.svd(differences, full_matrices=False)
    quantizer, kept = model.quantizer, model.config.codebook_dim
    whitened = directions[:kept] / spread[:kept, None] * len(differences) ** 0.5
    quantizer.proj.weight.copy_(whitened)
    quantizer.proj.bias.copy_(-whitened @ regions.mean((0, 1)))
    queries = quantizer.queries(regions).flatten(0, 1)
    quantizer.codebook.copy_(queries[torch.randperm(len(queries))[: model.config.codebook_size]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("foundation", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = VFMTok(config_from_mapping(VFMTokConfig, json.loads(CONFIG.read_text())))
    load_backbone(model, options.foundation)
    place(model)
    look(model.eval(), read(options.pictures).images)
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
