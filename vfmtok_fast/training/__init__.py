"""Training of the tokenizer and the generator, following their authors.

>>> from vfmtok_fast import training
>>> lpips = training.LPIPS.from_files("vgg16-397923af.pth", "vgg.pth")
"""

from . import checkpoints
from .data import Codes, OnlineCodes, Pictures
from .discriminator import DinoDiscriminator, PatchDiscriminator
from .gpt import GPTTrainer
from .loop import Run, Stopped, generated, reconstructions
from .losses import LPIPS
from .settings import GPTTraining, TokenizerTraining, rae
from .tokenizer import TokenizerTrainer
from .trainer import NotFinite, Trainer

__all__ = [
    "LPIPS",
    "Codes",
    "DinoDiscriminator",
    "GPTTrainer",
    "GPTTraining",
    "NotFinite",
    "OnlineCodes",
    "PatchDiscriminator",
    "Pictures",
    "Run",
    "Stopped",
    "TokenizerTrainer",
    "TokenizerTraining",
    "Trainer",
    "checkpoints",
    "generated",
    "rae",
    "reconstructions",
]
