"""Triton `ops.deformable_sample`: softmax, locations, sampling and weighted sum in one launch.

What it computes: out[b, q, h] = sum over levels and points of a * v(x, y) [D], where a is a softmax
over the L*P logits of (b, q, h) and v the bilinear value at reference * size + offset - 1/2. One
launch forward, two backward; `deformable_sample_kernels` has the kernels. Nothing of size
[B, Q, H, L, P, D] is written, and no gradient is added up by atomics.

Bytes for B=64, Q=256, H=8, L=P=4, D=64, four levels of 24 x 24 in bfloat16: 151 MB of values, 27 MB
of the rest, so 42 us at an H200's 4.3 TB/s forward, twice that backward. README.md has the
derivation, the predicted times and what was rejected.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .deformable_sample_kernels import (
    LARGEST_SIDE,
    SIDE,
    _dense,
    _gather,
    _grad_samples,
    _grad_value,
    word,
)
from .launch import on

# Values [queries * points, channels] in the registers of one program of 4 warps (half that where a
# value or a row is wide: more would spill), and queries of one program of the two dense kernels.
GATHER_VALUES = 8192
SAMPLES_VALUES = 4096
DENSE_ROWS, DENSE_WARPS = 128, 8
# Of the second, half that for float32 and on chips of the 10.0 generation, which would spill.
VALUE_ROWS = 64
# Tiles that one program of _grad_value has side by side: a row of a 24 x 24 map.
VALUE_TILES = 3
# Largest level, in pixels per channel of a head, that takes the dense form of the forward pass: it
# works for every pixel, the other for every channel of a sample (README.md, "Two forms"). Triton
# before 3.8 finds no good layout for it: four times the instructions, and spills.
DENSE_PIXELS = 4 if tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 8) else 0


def unsupported_reason(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    offsets: Tensor,
    attention_logits: Tensor,
) -> str | None:
    """Why this cannot take the call, or None."""
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {value.dtype}"
    if not 1 <= value.shape[3] <= 128:
        return f"it takes heads of dimension 1 to 128, not {value.shape[3]}"
    if not 1 <= attention_logits.shape[3] <= 256:
        return f"it takes 1 to 256 samples per query, not {attention_logits.shape[3]}"
    if max(max(shape) for shape in spatial_shapes) > LARGEST_SIDE:
        return f"it takes levels of at most {LARGEST_SIDE} pixels along a side"
    # Within an image the kernels count in 32 bits.
    if value.shape[1:].numel() >= 2**31:
        return "it takes less than 2^31 values per image"
    return None


def deformable_sample(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """See `vfmtok_fast.ops.deformable_sample`; takes what `unsupported_reason` lets pass."""
    sides = [side for shape in spatial_shapes for side in shape]
    return torch.ops.vfmtok_fast.deformable_sample_triton(
        value, sides, reference_points, offsets, attention_logits
    )


def _is_blackwell(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def _levels(sides: list[int]) -> list[tuple[int, int]]:
    return list(zip(sides[::2], sides[1::2], strict=True))


def _constants(offsets: Tensor, dim: int, smallest: int = 1) -> dict[str, int]:
    L, P = offsets.shape[3:5]
    wide = {"C": max(smallest, triton.next_power_of_2(dim)), "WIDE": triton.next_power_of_2(P)}
    return {"L": L, "P": P, "D": dim, **wide}


def _rows(values: int, Q: int, C: int, WIDE: int) -> int:
    """Queries of one program that holds ``values`` in registers."""
    return max(1, min(values // (C * WIDE), triton.next_power_of_2(Q)))


def _takes_dense(value: Tensor, levels: list[tuple[int, int]], points: int) -> bool:
    largest = max(height * width for height, width in levels)
    small = largest <= DENSE_PIXELS * value.shape[3]
    # Wider rows and more points than that do not fit into the registers.
    return small and value.dtype != torch.float32 and value.shape[3] <= 64 and points <= 8


def _forward(
    value: Tensor, sides: list[int], points: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    value, points, offsets, logits = (x.contiguous() for x in (value, points, offsets, logits))
    (B, S, H, D), Q, levels = value.shape, offsets.shape[1], _levels(sides)
    out = torch.empty(B, Q, H * D, dtype=value.dtype, device=value.device)
    if out.numel() == 0:
        return out
    words = tuple(word(*level) for level in levels)
    every = {"ALL": triton.next_power_of_2(logits.shape[3])}
    arguments = value, points, offsets, logits, out, words, S, Q, H, points.shape[0]
    with on(value.device):
        if _takes_dense(value, levels, offsets.shape[4]):
            constants = _constants(offsets, D, smallest=16)
            _dense[(B * H * triton.cdiv(Q, DENSE_ROWS),)](
                *arguments, **constants, **every, ROWS=DENSE_ROWS, num_warps=DENSE_WARPS
            )
        else:
            constants = _constants(offsets, D)
            C, WIDE = constants["C"], constants["WIDE"]
            rows = _rows(GATHER_VALUES if 32 <= C <= 64 else GATHER_VALUES // 2, Q, C, WIDE)
            _gather[(B * H * triton.cdiv(Q, rows),)](
                *arguments, **constants, **every, ROWS=rows, num_warps=4
            )
    return out


def _backward_samples(
    grad: Tensor, value: Tensor, sides: list[int], points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of offsets and logits, and the softmax's log-sum-exp [B, Q, H] float32."""
    grad, value = grad.contiguous(), value.contiguous()
    points, offsets, logits = (x.contiguous() for x in (points, offsets, logits))
    (B, S, H, D), Q = value.shape, offsets.shape[1]
    grad_offsets, grad_logits = torch.empty_like(offsets), torch.empty_like(logits)
    log_sum = torch.empty(B, Q, H, dtype=torch.float32, device=value.device)
    if log_sum.numel() == 0:
        return grad_offsets, grad_logits, log_sum
    constants = _constants(offsets, D)
    values = SAMPLES_VALUES if value.itemsize == 2 else SAMPLES_VALUES // 2
    rows = _rows(values, Q, constants["C"], constants["WIDE"])
    words = tuple(word(*level) for level in _levels(sides))
    with on(value.device):
        _grad_samples[(B * H * triton.cdiv(Q, rows),)](
            grad, value, points, offsets, logits, grad_offsets, grad_logits, log_sum, words,
            S, Q, H, points.shape[0], **constants, ALL=triton.next_power_of_2(logits.shape[3]),
            LEVELS=triton.next_power_of_2(len(words)), ROWS=rows, num_warps=4,
        )  # fmt: skip
    return grad_offsets, grad_logits, log_sum


def _backward_value(
    grad: Tensor, sides: list[int], points: Tensor, offsets: Tensor, logits: Tensor,
    log_sum: Tensor, D: int,
) -> Tensor:  # fmt: skip
    """Gradient of the values."""
    grad, points, offsets, logits = (x.contiguous() for x in (grad, points, offsets, logits))
    (B, Q, H), levels = offsets.shape[:3], _levels(sides)
    S = sum(height * width for height, width in levels)
    grad_value = torch.empty(B, S, H, D, dtype=grad.dtype, device=grad.device)
    if grad_value.numel() == 0:
        return grad_value
    side, constants = SIDE.value, _constants(offsets, D, smallest=16)
    widest = max(triton.cdiv(width, side) for _, width in levels)
    # float32 multiplies in the registers that further tiles would need; so do wide rows.
    several = grad.itemsize == 2 and constants["C"] <= 64
    tiles = min(widest, VALUE_TILES if several else 1)
    rows = VALUE_ROWS if grad.itemsize == 2 and not _is_blackwell(grad.device) else VALUE_ROWS // 2
    strips = sum(triton.cdiv(h, side) * triton.cdiv(w, side * tiles) for h, w in levels)
    words = tuple(word(*level) for level in levels)
    with on(grad.device):
        _grad_value[(B * H * strips,)](
            grad, points, offsets, logits, log_sum, grad_value, words, S, Q, H, points.shape[0],
            strips, **constants, ROWS=rows, TILES=tiles, num_warps=4,
        )  # fmt: skip
    return grad_value


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.sides, points, offsets, logits = inputs
    ctx.save_for_backward(value, points, offsets, logits)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, points, offsets, logits = ctx.saved_tensors
    ops = torch.ops.vfmtok_fast
    by_offsets, by_logits, log_sum = ops.deformable_sample_triton_samples(
        grad, value, ctx.sides, points, offsets, logits
    )
    by_value = by_points = None
    if ctx.needs_input_grad[0]:
        by_value = ops.deformable_sample_triton_value(
            grad, ctx.sides, points, offsets, logits, log_sum, value.shape[3]
        )
    if ctx.needs_input_grad[2]:
        # A point moves all samples of its level, by its size in pixels: numbers, for a tensor of
        # them would be copied from the host, which no captured graph can hold.
        by_points = by_offsets.sum(dim=(2, 4), dtype=torch.float32)
        for level, (height, width) in enumerate(_levels(ctx.sides)):
            by_points[:, :, level, 0].mul_(width)
            by_points[:, :, level, 1].mul_(height)
        by_points = by_points.to(points.dtype).sum_to_size(points.shape)
    return by_value, None, by_points, by_offsets, by_logits


def _no_second_derivative(ctx, *grads: Tensor | None) -> None:
    raise NotImplementedError(
        "deformable_sample: its Triton kernels have first derivatives only; "
        "leave this op out of enable(ops=...)"
    )


def _like_queries(value: Tensor, sides, points, offsets: Tensor, logits) -> Tensor:
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


def _like_samples(grad, value, sides, points, offsets: Tensor, logits: Tensor):
    log_sum = offsets.new_empty(offsets.shape[:3], dtype=torch.float32)
    return torch.empty_like(offsets), torch.empty_like(logits), log_sum


def _like_value(grad: Tensor, sides, points, offsets: Tensor, logits, log_sum, dim: int) -> Tensor:
    pixels = sum(height * width for height, width in _levels(sides))
    return grad.new_empty(offsets.shape[0], pixels, offsets.shape[2], dim)


_library = torch.library.Library("vfmtok_fast", "FRAGMENT")
for _name, _schema, _launch, _fake in (
    ("", "(Tensor value, int[] sides, Tensor points, Tensor offsets, Tensor logits) -> Tensor",
     _forward, _like_queries),
    ("_samples", "(Tensor grad, Tensor value, int[] sides, Tensor points, Tensor offsets, "
     "Tensor logits) -> (Tensor, Tensor, Tensor)", _backward_samples, _like_samples),
    ("_value", "(Tensor grad, int[] sides, Tensor points, Tensor offsets, Tensor logits, "
     "Tensor log_sum, int dim) -> Tensor", _backward_value, _like_value),
):  # fmt: skip
    _library.define(f"deformable_sample_triton{_name}{_schema}")
    _library.impl(f"deformable_sample_triton{_name}", _launch, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"vfmtok_fast::deformable_sample_triton{_name}", _fake, lib=_library
    )
torch.library.register_autograd(
    "vfmtok_fast::deformable_sample_triton", _backward, setup_context=_setup, lib=_library
)
# Left out, torch would take their derivatives for zero.
for _name in ("_samples", "_value"):
    torch.library.register_autograd(
        f"vfmtok_fast::deformable_sample_triton{_name}", _no_second_derivative, lib=_library
    )
