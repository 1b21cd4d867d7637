"""The autoregressive generator."""

from .config import PRESETS, GPTConfig
from .generate import Sampling
from .kv_cache import KVCache
from .transformer import GPT

__all__ = ["GPT", "PRESETS", "GPTConfig", "KVCache", "Sampling"]
