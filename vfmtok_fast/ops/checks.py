"""Checks of op arguments: one-line errors with the op, the expected and the actual value."""

from __future__ import annotations

import math
import numbers
from fractions import Fraction

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint32, torch.uint16, torch.uint8),
)


def check_tensor(
    op: str, name: str, value: object, shape: str, size: int | tuple[int, ...]
) -> None:
    """Require a floating tensor of ``size``, its number of dimensions or its exact shape.

    The error for another number of dimensions quotes ``shape``.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.ndim != (size if isinstance(size, int) else len(size)):
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be floating point, got {value.dtype}")
    if not isinstance(size, int):
        check_shape(op, name, value, size)


def check_on(op: str, name: str, value: Tensor, like: str, other: Tensor) -> None:
    """Require the device of ``other``; the error calls that tensor ``like``."""
    if value.device != other.device:
        raise ValueError(
            f"{op}: {name} must be on {other.device}, as {like} is, got {value.device}"
        )


def check_same(op: str, autocast: bool = False, **tensors: Tensor) -> None:
    """Require that all ``tensors`` have one device and one dtype.

    ``autocast``: while torch.autocast is on, the op also accepts mixed dtypes.
    """
    (first_name, first), *others = tensors.items()
    mixed = autocast and torch.is_autocast_enabled(first.device.type)
    for name, other in others:
        check_on(op, name, other, first_name, first)
        if not mixed and other.dtype != first.dtype:
            raise TypeError(
                f"{op}: {name} must be {first.dtype}, as {first_name} is, got {other.dtype}"
            )


def as_autocast(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast the tensors of a linear layer as autocast does; require one device and dtype."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    check_same(op, x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    return x, weight, bias


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


def check_int(op: str, name: str, value: object, high: int, low: int = 0) -> None:
    """Require an int in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not low <= value < high:
        # The large ones are powers of two.
        bound = high if high < 2**31 else f"2^{high.bit_length() - 1}"
        raise ValueError(f"{op}: {name} must be in [{low}, {bound}), got {value}")


def check_number(op: str, name: str, value: object) -> None:
    """Require a real number, not a tensor, whose value might have to be waited for."""
    # A Fraction is a Real too, but no tensor can be multiplied with it.
    if isinstance(value, bool | Fraction) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_eps(op: str, eps: object) -> None:
    """Require a finite number of at least 0."""
    check_number(op, "eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"{op}: eps must be finite and at least 0, got {eps}")


def check_groups(op: str, groups: object, channels: int) -> None:
    """Require a number of groups that divides ``channels``."""
    check_int(op, "num_groups", groups, 2**31, 1)
    if channels % groups:
        raise ValueError(f"{op}: num_groups must divide the {channels} channels, got {groups}")


def check_position(
    op: str, name: str, value: object, low: int, high: int, counts: tuple[int, ...], **like: Tensor
) -> None:
    """Require an int in [low, high), or an integer tensor with a number of elements in ``counts``.

    A tensor must be on the device of ``like``. Its values are not checked, which would need a
    synchronisation.
    """
    if not isinstance(value, Tensor):
        check_int(op, name, value, high, low)
        return
    if value.dtype not in INTEGER:
        raise TypeError(f"{op}: {name} must hold integers, got {value.dtype}")
    ((other_name, other),) = like.items()
    check_on(op, name, value, other_name, other)
    if value.numel() not in counts:
        allowed = " or ".join(str(count) for count in sorted(set(counts)))
        raise ValueError(
            f"{op}: {name} must have {allowed} elements, got shape {tuple(value.shape)}"
        )


def check_range(op: str, name: str, value: Tensor, low: int, high: int) -> None:
    """Require integers in [low, high); skipped where the values cannot be read.

    That is the case while compiling or capturing a CUDA graph; the caller then checks beforehand.
    """
    if value.dtype not in INTEGER:
        raise TypeError(f"{op}: {name} must hold integers, got {value.dtype}")
    if not readable(value):
        return
    # torch cannot compare the wider unsigned types, such as the token cache's uint16.
    smallest, largest = torch.stack(torch.aminmax(unwrapped(value).long())).tolist()
    if smallest < low or largest >= high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"{op}: {name} must be in [{low}, {high}), got {wrong}")


def readable(value: Tensor) -> bool:
    """Whether values can be read now: not while compiling or capturing a CUDA graph."""
    if torch.compiler.is_compiling() or value.numel() == 0:
        return False
    if isinstance(unwrapped(value), FakeTensor):
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def unwrapped(value: Tensor) -> Tensor:
    """Return the values beneath torch.func's wrappers, under vmap those of the whole batch."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value
