"""vfmtok_fast: the VFMTok image tokenizer and its generator, readable and fast.

>>> import vfmtok_fast as vf
>>> tok = vf.VFMTok(vf.VFMTokConfig())
>>> codes = tok.encode(vf.images.load_images(["photo.jpg"]))

What the package offers is imported when it is first asked for, so that the command line answers
before torch is there.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import cache, evaluation, images, ops, switch, training
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
    "evaluation",
    "images",
    "ops",
    "status",
    "switch",
    "training",
    "tune",
]

_MODULES = {"cache", "evaluation", "images", "ops", "switch", "training"}
_HOMES = {
    "generator": {"GPT", "GPTConfig"},
    "switch": {"disable", "enable", "status"},
    "tokenizer": {"BackboneConfig", "VFMTok", "VFMTokConfig"},
    "tuner": {"tune"},
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f".{home}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
