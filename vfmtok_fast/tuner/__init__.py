"""Measures the kernel settings on this machine's GPU and keeps the best."""

from .run import Outcome, tune

__all__ = ["Outcome", "tune"]
