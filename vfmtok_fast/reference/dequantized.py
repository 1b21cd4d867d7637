"""Weights, keys and values of 8 bits, in full: the oracle of what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor


def dequantized(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``weight`` [..., K] itself; or of int8, times ``scale`` [...] of its rows, in ``dtype``."""
    if scale is None:
        return weight
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    return (weight.to(exact) * scale.to(exact)[..., None]).to(dtype)
