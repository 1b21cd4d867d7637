"""What ends a decoding step: codes go where they belong, and become the next step's input."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import append_code as reference
from ..switch import Op
from .checks import check_on, check_position, check_range, check_same, check_shape, check_tensor

_op = Op("append_code", reference.append_code)


def append_code(
    code: Tensor, codes: Tensor, position: int | Tensor, embedding: Tensor, x: Tensor
) -> None:
    """Write ``code`` into column ``position`` of ``codes``, and its embedding into ``x``, in place.

    Args:
        code: [B] int64, a code of every image, in [0, V).
        codes: [B, T] int64.
        position: in 0..T - 1, an int; or an int64 tensor that is advanced by one afterwards, of one
            element, or of two (the position, and the length ``position + 1``). Its value stays on
            its device and is not checked, which would need a synchronisation.
        embedding: [V, C].
        x: [R * B, C], the embedded codes R times over: for R = 2 the rows of guidance,
            [conditional; unconditional].

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that do not fit each other, two devices, a code or position outside.
    """
    name = "append_code"
    check_tensor(name, "embedding", embedding, "[V, C]", 2)
    check_tensor(name, "x", x, "[R * B, C]", 2)
    check_same(name, embedding=embedding, x=x)
    _check_int64("code", code, "[B]", 1, embedding)
    _check_int64("codes", codes, "[B, T]", 2, embedding)
    (B,), T, (V, C) = code.shape, codes.shape[1], embedding.shape
    check_shape(name, "codes", codes, (B, T))
    if x.shape[1] != C or (x.shape[0] % B if B else x.shape[0]):
        raise ValueError(f"{name}: x must have shape [R * {B}, {C}], got {tuple(x.shape)}")
    if isinstance(position, Tensor):
        _check_int64("position", position, "[1] or [2]", 1, embedding)
    check_position(name, "position", position, 0, T, (1, 2), embedding=embedding)
    check_range(name, "code", code, 0, V)
    return _op(code, codes, position, embedding, x)


def _check_int64(name: str, value: object, shape: str, ndim: int, like: Tensor) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"append_code: {name} must be an int64 tensor, got {kind}")
    if value.ndim != ndim:
        raise ValueError(f"append_code: {name} must have shape {shape}, got {tuple(value.shape)}")
    check_on("append_code", name, value, "embedding", like)
