"""Small generators with random weights, so that their codes differ."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from vfmtok_fast import GPT, RAR, GPTConfig, RARConfig

CONFIG = GPTConfig(
    num_layers=2, num_heads=4, dim=64, vocab_size=512, block_size=16, num_classes=10,
    ffn_multiple_of=32,
)  # fmt: skip
CLASSES = torch.arange(64) % 10
# Ways to draw: filters, guidance in all steps, in some, and in none.
SETTINGS = (
    {"seed": 1},
    {"seed": 2, "cfg_scale": 2.0},
    {"seed": 3, "cfg_scale": 1.5, "cfg_interval": 4, "top_k": 40},
    {"seed": 4, "cfg_scale": 0.0, "top_p": 0.9, "temperature": 0.8},
    {"greedy": True, "cfg_scale": 3.0, "cfg_interval": 0},
)


def make(config: GPTConfig = CONFIG, **changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(config, **changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def make_rar(**changes) -> RAR:
    config = {
        "num_layers": 2, "num_heads": 2, "dim": 20, "mlp_dim": 48, "vocab_size": 37,
        "block_size": 16, "num_classes": 5,
    }  # fmt: skip
    torch.manual_seed(0)
    model = RAR(RARConfig(**config | changes)).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.4)
    return model
