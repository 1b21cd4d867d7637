"""The ops of the pixel decoder against their references, by level: norm, block, upsampling."""

from __future__ import annotations

import functools
from collections.abc import Callable

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, GPU
from torch import Tensor

from vfmtok_fast import ops, tf32

DTYPES = ("bfloat16", "float32")
B = 16 if GPU else 1
# (channels in, out, side) of the block that begins a level and of the op that ends it.
LEVELS = {"21": (512, 512, 21), "84": (256, 256, 84), "336": (128, 128, 336)}
if not GPU:
    del LEVELS["336"]


def new(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=draw)).to(DEVICE, dtype)


@functools.lru_cache(maxsize=1)
def inputs(level: str, dtype: str) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """A map in channels-last layout, and the two (norm, convolution) pairs of a block."""
    C, out, side = LEVELS[level]
    kind = getattr(torch, dtype)
    x = new(B, C, side, side, dtype=kind).contiguous(memory_format=torch.channels_last)
    pairs = []
    for width in (C, out):
        pairs.append((new(width, dtype=kind), new(width, dtype=kind)))
        kernel = new(out, width, 3, 3, dtype=kind, scale=(9 * width) ** -0.5)
        pairs.append((kernel, new(out, dtype=kind)))
    return x, pairs


def norm(x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return ops.group_norm_silu(x, *pairs[0], 32)


def block(x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return ops.residual_block(x, *pairs)


def upsample(x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    return ops.upsample_conv(x, *pairs[1])


def woven(x: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Four 2x2 convolutions of the small map, one for each of the four output positions."""
    weight, bias = pairs[1]
    (images, _, height, width), wide = x.shape, weight.float()
    out = torch.empty(
        images, len(weight), 2 * height, 2 * width, dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    for i in (0, 1):
        both = torch.stack([wide[:, :, : 1 + i].sum(2), wide[:, :, 1 + i :].sum(2)], 2)
        for j in (0, 1):
            parts = both[..., : 1 + j].sum(-1), both[..., 1 + j :].sum(-1)
            kernel = torch.stack(parts, 3).to(weight.dtype)
            part = F.conv2d(F.pad(x, (1 - j, j, 1 - i, i)), kernel, bias)
            out[:, :, i::2, j::2] = part
    return out


CASES = {"group_norm_silu": norm, "residual_block": block, "upsample_conv": upsample}


def providers(op: str) -> dict[str, Callable]:
    call = CASES[op]
    found = {"reference": lambda: call, "fast": lambda: call}
    if GPU:
        found["reference compiled"] = lambda: torch.compile(call, dynamic=False)
    if op == "upsample_conv":
        found["four convolutions"] = lambda: woven
    return found


def work(op: str, level: str, itemsize: int) -> harness.Work:
    """Bytes of the map read, the map written and the weights; operations of the convolutions."""
    C, out, side = LEVELS[level]
    pixels = B * side * side
    if op == "group_norm_silu":
        return harness.Work(bytes=2 * pixels * C * itemsize, flops=10 * pixels * C)
    if op == "residual_block":
        weights = 9 * out * (C + out)
        bytes_ = (pixels * (C + out) + weights) * itemsize
        return harness.Work(bytes=bytes_, flops=2 * pixels * weights)
    bytes_ = (pixels * (C + 4 * out) + 9 * C * out) * itemsize
    return harness.Work(bytes=bytes_, flops=2 * pixels * 16 * C * out)


@pytest.mark.parametrize(("op", "provider"), [(op, name) for op in CASES for name in providers(op)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def bench_pixel_decoder(benchmark, level: str, dtype: str, op: str, provider: str):
    x, pairs = inputs(level, dtype)
    call = providers(op)[provider]()

    def check(got: Tensor) -> dict[str, object]:
        error = float((got.float() - want).abs().max() / want.abs().max())
        # The sum has another order, so rounding errors add up like a random walk.
        allowed = 4 * torch.finfo(x.dtype).eps * (9 * x.shape[1]) ** 0.5
        assert error <= allowed, f"off by {error:.1e} of the largest value"
        return {"batch": B, "dtype": dtype, "error": error}

    # By default, torch allows TF32 in convolutions.
    with torch.no_grad(), tf32.computing(x.device, False):
        want = CASES[op](x, pairs).float()
        harness.measure(
            benchmark,
            op=op,
            shape=f"B={B} level {level} {dtype}",
            provider=provider,
            fn=lambda: call(x, pairs),
            check=check,
            work=work(op, level, x.itemsize),
            enabled=op if provider == "fast" else None,
        )
