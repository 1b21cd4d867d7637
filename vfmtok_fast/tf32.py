"""Torch's switches for TF32, which are the process's: one call at a time sets them."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_switches = threading.RLock()
_tf32 = contextvars.ContextVar("tf32", default=False)


@contextlib.contextmanager
def computing(device: torch.device, tf32: bool) -> Iterator[None]:
    """Float32 products on a GPU with or without TF32, for the time of a block.

    `attention_dtype` follows. Calls of several threads take turns. Under torch.compile the
    process's own switches count.
    """
    if torch.compiler.is_compiling() or device.type != "cuda":
        yield
        return
    with _switches:
        before, named = [setting.fp32_precision for setting in _settings()], _named()
        _set(["tf32" if tf32 else "ieee"] * len(before))
        token = _tf32.set(tf32)
        try:
            yield
        finally:
            _tf32.reset(token)
            _set(before)
            if named == "medium":  # Which no switch of `_set` knows.
                torch.set_float32_matmul_precision(named)


def settled() -> threading.RLock:
    """A lock: while it is held the switches are the process's own, and nobody moves them."""
    return _switches


def _named() -> str | None:
    """What `torch.set_float32_matmul_precision` was told; None where a new name says otherwise."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _settings() -> tuple:
    return torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def _set(values: Sequence[str]) -> None:
    # The old names first: they set the new ones too, and raise when they are read, as inductor does
    # while it compiles, if a new one was set to TF32 alone.
    torch.backends.cuda.matmul.allow_tf32 = values[0] == "tf32"
    torch.backends.cudnn.allow_tf32 = values[1] == "tf32"
    for setting, value in zip(_settings(), values, strict=True):
        setting.fp32_precision = value


def attention_dtype(x: Tensor) -> torch.dtype:
    """What to attend in: that of ``x``, but float16 for float32 where products are TF32.

    torch's fused attention keeps float32 by three TF32 products for one, on an H200 at a sixth of
    float16's rate (predicted). Gradients need float32's range.
    """
    if (
        x.dtype != torch.float32
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not _tf32.get()
    ):
        return x.dtype
    return torch.float16
