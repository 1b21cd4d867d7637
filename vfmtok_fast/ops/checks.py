"""Checks that the ops share: each raises one line with the op, what it expected, what came."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER = (torch.int64, torch.int32, torch.int16, torch.uint8)


def check_tensor(op: str, name: str, value: object, shape: str, ndim: int) -> None:
    """Require a floating tensor of ``ndim`` dimensions; ``shape`` is how the error words that."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.ndim != ndim:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")


def check_same(op: str, **tensors: Tensor) -> None:
    """Require one device and one dtype of all ``tensors``."""
    (first_name, first), *others = tensors.items()
    for name, other in others:
        if other.device != first.device:
            raise ValueError(
                f"{op}: {name} must be on {first.device}, as {first_name} is, got {other.device}"
            )
        if other.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must be {first.dtype}, as {first_name} is, got {other.dtype}"
            )


def check_shape(op: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Require exactly ``shape``."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")


def check_range(op: str, name: str, value: Tensor, low: int, high: int, what: str) -> None:
    """Require integers in [low, high); skipped where reading the values is impossible or costly.

    That is while compiling or capturing a CUDA graph, where the caller checks beforehand.
    """
    if value.dtype not in INTEGER:
        raise TypeError(f"{op}: {name} must hold integers, got {value.dtype}")
    if torch.compiler.is_compiling() or value.numel() == 0:
        return
    if value.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    smallest, largest = (int(edge) for edge in torch.aminmax(value))
    if smallest < low or largest >= high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"{op}: {name} must be {what} in [{low}, {high}), got {wrong}")
