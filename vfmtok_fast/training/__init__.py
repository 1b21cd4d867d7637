"""Training the tokenizer as its authors do.

>>> from vfmtok_fast import training
>>> lpips = training.LPIPS.from_files("vgg16-397923af.pth", "vgg.pth")
"""

from . import checkpoints
from .data import Pictures
from .discriminator import DinoDiscriminator, PatchDiscriminator
from .loop import Run, Stopped
from .losses import LPIPS
from .trainer import NotFinite, TokenizerTrainer, TokenizerTraining, rae

__all__ = [
    "LPIPS",
    "DinoDiscriminator",
    "NotFinite",
    "PatchDiscriminator",
    "Pictures",
    "Run",
    "Stopped",
    "TokenizerTrainer",
    "TokenizerTraining",
    "checkpoints",
    "rae",
]
