"""The image tokenizer."""

from .config import BackboneConfig, VFMTokConfig
from .model import VFMTok, VFMTokOutput

__all__ = ["BackboneConfig", "VFMTok", "VFMTokConfig", "VFMTokOutput"]
