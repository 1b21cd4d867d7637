"""vfmtok_fast: the VFMTok image tokenizer and its generator, readable and fast.

>>> import vfmtok_fast as vf
>>> tok = vf.VFMTok.from_pretrained("emoji")  # the small model that ships with the package
>>> codes = tok.encode(vf.images.load_images(["photo.jpg"], tok.config.image_size))

Public names are imported on first access, so that the command line can answer before torch is
loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import attach

if TYPE_CHECKING:
    from . import cache, evaluation, images, ops, switch, training
    from .generator import GPT, RAR, GPTConfig, RARConfig
    from .switch import disable, enable, status
    from .tokenizer import BackboneConfig, VFMTok, VFMTokConfig
    from .tuner import tune

__version__ = "0.1.0"

__all__ = [
    "GPT",
    "RAR",
    "BackboneConfig",
    "GPTConfig",
    "RARConfig",
    "VFMTok",
    "VFMTokConfig",
    "cache",
    "disable",
    "enable",
    "evaluation",
    "images",
    "ops",
    "status",
    "switch",
    "training",
    "tune",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "generator": {"GPT", "GPTConfig", "RAR", "RARConfig"},
        "switch": {"disable", "enable", "status"},
        "tokenizer": {"BackboneConfig", "VFMTok", "VFMTokConfig"},
        "tuner": {"tune"},
    },
    modules={"cache", "evaluation", "images", "ops", "switch", "training"},
)
