"""The autoregressive generator."""

from .config import PRESETS, GPTConfig
from .decoder import Decoder
from .sampling import Sampling
from .transformer import GPT

__all__ = ["GPT", "PRESETS", "Decoder", "GPTConfig", "Sampling"]
