"""The autoregressive generators."""

from .config import PRESETS, GPTConfig
from .decoder import Decoder
from .load import load_generator
from .model import Generator
from .rar import RAR, RARConfig
from .sampling import Sampling
from .transformer import GPT

__all__ = [
    "GPT",
    "PRESETS",
    "RAR",
    "Decoder",
    "GPTConfig",
    "Generator",
    "RARConfig",
    "Sampling",
    "load_generator",
]
