"""Training the tokenizer as its authors do.

>>> from vfmtok_fast import training
>>> lpips = training.LPIPS.from_files("vgg16-397923af.pth", "vgg.pth")
"""

from . import checkpoints
from .discriminator import DinoDiscriminator, PatchDiscriminator
from .losses import LPIPS
from .trainer import NotFinite, TokenizerTrainer, TokenizerTraining

__all__ = [
    "LPIPS",
    "DinoDiscriminator",
    "NotFinite",
    "PatchDiscriminator",
    "TokenizerTrainer",
    "TokenizerTraining",
    "checkpoints",
]
