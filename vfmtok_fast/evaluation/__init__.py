"""Metrics that judge tokenizers and generators, by named protocols.

>>> from vfmtok_fast import evaluation
>>> inception = evaluation.Inception("weights-inception-2015-12-05-6726825d.pth")
>>> protocol = evaluation.PROTOCOLS["generation-adm"]
"""

from .features import Inception
from .generation import evaluate_generation, open_reference, plot_sweep
from .metrics import (
    Statistics,
    frechet_distance,
    inception_score,
    precision_recall,
    psnr,
    ssim,
)
from .probes import PROBES, Probe, evaluate_probe, linear_probe, nearest_neighbours
from .protocols import PROTOCOLS, Generation, Reconstruction, class_ids, protocol
from .reconstruction import evaluate_reconstruction

__all__ = [
    "PROBES",
    "PROTOCOLS",
    "Generation",
    "Inception",
    "Probe",
    "Reconstruction",
    "Statistics",
    "class_ids",
    "evaluate_generation",
    "evaluate_probe",
    "evaluate_reconstruction",
    "frechet_distance",
    "inception_score",
    "linear_probe",
    "nearest_neighbours",
    "open_reference",
    "plot_sweep",
    "precision_recall",
    "protocol",
    "psnr",
    "ssim",
]
