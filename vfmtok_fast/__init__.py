"""vfmtok_fast: the VFMTok image tokenizer and its generator, readable and fast.

>>> import vfmtok_fast as vf
>>> tok = vf.VFMTok(vf.VFMTokConfig())
>>> codes = tok.encode(vf.images.load_images(["photo.jpg"]))
"""

from . import cache, images, ops
from .generator import GPT, GPTConfig
from .switch import disable, enable, status
from .tokenizer import BackboneConfig, VFMTok, VFMTokConfig
from .tuner import tune

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "BackboneConfig",
    "GPTConfig",
    "VFMTok",
    "VFMTokConfig",
    "cache",
    "disable",
    "enable",
    "images",
    "ops",
    "status",
    "tune",
]
