"""torch's TF32 switches, which belong to the process: one call at a time sets them."""

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
    """Compute float32 products on a GPU with or without TF32 inside the ``with`` block.

    `attention_dtype` follows this setting. Calls from several threads take turns. Under
    torch.compile the process's own switches apply.
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
            if named == "medium":  # `_set` cannot express this one.
                torch.set_float32_matmul_precision(named)


def settled() -> threading.RLock:
    """Return a lock; while it is held, the switches are the process's own and do not change."""
    return _switches


def _named() -> str | None:
    """The last `torch.set_float32_matmul_precision`; None if the new switches contradict it."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _settings() -> tuple:
    return torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn


def _set(values: Sequence[str]) -> None:
    # The old names first: they also set the new ones. Reading them, as inductor does while it
    # compiles, raises if only a new one was set to TF32.
    torch.backends.cuda.matmul.allow_tf32 = values[0] == "tf32"
    torch.backends.cudnn.allow_tf32 = values[1] == "tf32"
    for setting, value in zip(_settings(), values, strict=True):
        setting.fp32_precision = value


def attention_dtype(x: Tensor) -> torch.dtype:
    """The dtype to attend in: that of ``x``, but float16 for float32 where products use TF32.

    torch's fused attention keeps float32 precision with three TF32 products instead of one, at a
    sixth of float16's rate on an H200 (predicted). Gradients need float32's range.
    """
    if (
        x.dtype != torch.float32
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or not _tf32.get()
    ):
        return x.dtype
    return torch.float16
