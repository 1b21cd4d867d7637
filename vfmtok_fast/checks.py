"""Checks of model inputs: one-line errors with the caller, the expected and the actual value."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .ops.checks import check_range, check_tensor, readable, unwrapped

# Resampling may overshoot [-1, 1] a little, which is clamped. Larger values mean another scale:
# ImageNet-normalised pixels reach 2.6, 8-bit values 255.
LARGEST_PIXEL = 1.5


def check_device(op: str, name: str, value: Tensor, device: torch.device) -> None:
    """Require that ``value`` is on the model's device."""
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on the model's device {device}, got {value.device}")


def check_images(op: str, images: object, size: int, device: torch.device) -> None:
    """Require floating images [B, 3, size, size] in [-1, 1]; up to `LARGEST_PIXEL` may pass."""
    watch_images(op, images, size, device)()


def watch_images(op: str, images: object, size: int, device: torch.device) -> Callable[[], None]:
    """Start `check_images`; the returned function waits for a GPU's values and checks them.

    Work launched before that call keeps the GPU busy meanwhile.
    """
    check_tensor(op, "images", images, f"[B, 3, {size}, {size}]", 4)
    if tuple(images.shape[1:]) != (3, size, size):
        raise ValueError(
            f"{op}: images must have shape [B, 3, {size}, {size}], got {tuple(images.shape)}"
        )
    check_device(op, "images", images, device)
    if not readable(images):
        return lambda: None
    edges = torch.stack(torch.aminmax(unwrapped(images).detach()))
    if not images.is_cuda:
        _check_edges(op, edges)
        return lambda: None
    with torch.cuda.device(images.device):
        here = torch.empty(2, dtype=edges.dtype, device="cpu", pin_memory=True)
        here.copy_(edges, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

    def finish() -> None:
        arrived.synchronize()
        _check_edges(op, here)

    return finish


def _check_edges(op: str, edges: Tensor) -> None:
    """Check the smallest and the largest pixel."""
    largest = float(edges.abs().amax())
    if math.isnan(largest):
        raise ValueError(f"{op}: images must be in [-1, 1], got NaN")
    if largest > LARGEST_PIXEL:
        raise ValueError(
            f"{op}: images must be in [-1, 1], got a magnitude of {largest:.4g}; "
            "8-bit pictures go through vfmtok_fast.images.to_float"
        )


def check_codes(op: str, codes: object, count: int, vocab: int, device: torch.device) -> None:
    """Require integer codes [B, count] in [0, vocab)."""
    if not isinstance(codes, Tensor):
        raise TypeError(f"{op}: codes must be a torch.Tensor, got {type(codes).__name__}")
    if codes.ndim != 2 or codes.shape[1] != count:
        raise ValueError(f"{op}: codes must have shape [B, {count}], got {tuple(codes.shape)}")
    check_device(op, "codes", codes, device)
    check_range(op, "codes", codes, 0, vocab)


def check_class_ids(op: str, class_ids: object, num_classes: int) -> None:
    """Require integer class ids [B] in [0, num_classes)."""
    if not isinstance(class_ids, Tensor):
        raise TypeError(f"{op}: class_ids must be a torch.Tensor, got {type(class_ids).__name__}")
    if class_ids.ndim != 1:
        raise ValueError(f"{op}: class_ids must have shape [B], got {tuple(class_ids.shape)}")
    check_range(op, "class_ids", class_ids, 0, num_classes)
