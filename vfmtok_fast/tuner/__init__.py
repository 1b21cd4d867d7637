"""Measuring the settings of the kernels on the GPU at hand."""

from .run import Outcome, tune

__all__ = ["Outcome", "tune"]
