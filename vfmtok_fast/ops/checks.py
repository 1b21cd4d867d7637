"""Checks that ops and models share: each raises one line: who, what was expected, what came."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Resampling may overshoot [-1, 1] a little, which is clamped. Further out is another scale:
# ImageNet-normalised pixels reach 2.6, 8-bit values 255.
LARGEST_PIXEL = 1.5
INTEGER = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint32, torch.uint16, torch.uint8),
)


def check_tensor(op: str, name: str, value: object, shape: str, ndim: int) -> None:
    """Require a floating tensor of ``ndim`` dimensions; ``shape`` is how the error words that."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.ndim != ndim:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")


def check_on(op: str, name: str, value: Tensor, like: str, other: Tensor) -> None:
    """Require the device of ``other``, which is called ``like``."""
    if value.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on {other.device}, as {like} is, got {value.device}"
        )


def check_same(op: str, **tensors: Tensor) -> None:
    """Require one device and one dtype of all ``tensors``."""
    (first_name, first), *others = tensors.items()
    for name, other in others:
        check_on(op, name, other, first_name, first)
        if other.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must be {first.dtype}, as {first_name} is, got {other.dtype}"
            )


def check_shape(op: str, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Require exactly ``shape``."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")


def check_integers(op: str, name: str, value: object, shape: tuple[int, ...]) -> None:
    """Require an integer tensor of exactly ``shape``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    check_shape(op, name, value, shape)
    if value.dtype not in INTEGER:
        raise TypeError(f"{op}: {name} must hold integers, got {value.dtype}")


def check_int(op: str, name: str, value: object, high: int) -> None:
    """Require an int in [0, high)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not 0 <= value < high:
        # The bounds are powers of two.
        raise ValueError(f"{op}: {name} must be in [0, 2^{high.bit_length() - 1}), got {value}")


def check_number(op: str, name: str, value: object) -> None:
    """Require a real number that is no tensor, which might have to be waited for."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_eps(op: str, eps: object) -> None:
    """Require a number of at least 0."""
    check_number(op, "eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps must be finite and at least 0, got {eps}")


def check_position(
    op: str, name: str, value: object, low: int, high: int, counts: tuple[int, ...], **like: Tensor
) -> None:
    """Require an int in [low, high), or a tensor of that where ``like`` is, with so many elements.

    The values of a tensor are not checked, which would need a synchronisation.
    """
    ((other_name, other),) = like.items()
    if isinstance(value, Tensor):
        if value.dtype not in INTEGER:
            raise TypeError(f"{op}: {name} must hold integers, got {value.dtype}")
        if value.device != other.device:
            raise ValueError(
                f"{op}: {name} must be on {other.device}, as {other_name} is, got {value.device}"
            )
        if value.numel() not in counts:
            allowed = " or ".join(str(count) for count in sorted(set(counts)))
            raise ValueError(
                f"{op}: {name} must have {allowed} elements, got shape {tuple(value.shape)}"
            )
    elif isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int or a tensor, got {type(value).__name__}")
    elif not low <= value < high:
        raise ValueError(f"{op}: {name} must be in {low}..{high - 1}, got {value}")


def check_range(op: str, name: str, value: Tensor, low: int, high: int) -> None:
    """Require integers in [low, high); skipped where reading the values is impossible or costly.

    That is while compiling or capturing a CUDA graph, where the caller checks beforehand.
    """
    if value.dtype not in INTEGER:
        raise TypeError(f"{op}: {name} must hold integers, got {value.dtype}")
    if not _readable(value):
        return
    # torch has no comparisons of the wider unsigned types, uint16 of the token cache among them.
    smallest, largest = (int(edge) for edge in torch.aminmax(value.long()))
    if smallest < low or largest >= high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"{op}: {name} must be in [{low}, {high}), got {wrong}")


def check_device(op: str, name: str, value: Tensor, device: torch.device) -> None:
    """Require the model's device."""
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on the model's device {device}, got {value.device}")


def check_images(op: str, images: object, size: int, device: torch.device) -> None:
    """Require floating images [B, 3, size, size] in [-1, 1], give or take `LARGEST_PIXEL`."""
    check_tensor(op, "images", images, f"[B, 3, {size}, {size}]", 4)
    if tuple(images.shape[1:]) != (3, size, size):
        raise ValueError(
            f"{op}: images must have shape [B, 3, {size}, {size}], got {tuple(images.shape)}"
        )
    check_device(op, "images", images, device)
    if not _readable(images):
        return
    largest = float(images.detach().abs().amax())
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


def _readable(value: Tensor) -> bool:
    """Whether the values can be looked at now: not while compiling or capturing a CUDA graph."""
    if torch.compiler.is_compiling() or value.numel() == 0:
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())
