"""Triton `ops.group_norm_silu`: statistics, then normalise and SiLU; maps are channels last.

What it computes: silu((x - mean) * rstd * weight + bias), with the mean and rstd of each group of
channels of an image over all pixels; x [B, C, H, W] with contiguous channels. Three launches:
`_partial` reads x and writes, for each channel of a chunk of pixels, the mean and the sum of
squared differences from it; `_combine` reduces these to a group's statistics; `_normalize` reads x
again and writes the result. No layout is copied. The backward pass also takes two passes over x:
`_grad_partial` sums over chunks of pixels, `_grad` writes. There are no atomics, and chunks do not
depend on the batch, so bits repeat.

Bytes: forward 3 |x|, backward 5 |x|. For 128 x 336 x 336 in bfloat16 and 64 images: 1.85 GB per
pass, 5.5 GB forward, 1.3 ms at an H200's 4.3 TB/s. ATen took 28 ms for all norms of a decode, and
77 ms for copies into the other layout and back. group_norm_silu.md has the cost of a decode.

This module also has the same op with the bias of the preceding convolution (``shift``), for
`residual_block`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on
from .linear import _sigmoid
from .registered import differentiable, registered
from .tuning import Space

# For the kernels that sum: ``values`` of x per tile, with separate sums for each position of the
# tile; an image is cut into at most ``chunks``, which `_combine` holds at once. On an H200, 16 maps
# of 84 pixels and 256 channels in bfloat16 take 38 us with 64 chunks, 85 with 256.
SUMS = Space(
    "group_norm_silu.sums",
    {"values": (2048, 4096), "warps": (4, 8), "chunks": (64, 128)},
    {80: {"values": 2048, "warps": 4, "chunks": 64}},
    bits=("values", "chunks"),
    valid=lambda setting: setting.values >= 512 * setting.warps,
)
# For the kernels that write a map: ``values`` per tile, ``tiles`` per program.
MAPS = Space(
    "group_norm_silu.maps",
    {"values": (2048, 4096, 8192), "warps": (4, 8), "tiles": (1, 4)},
    {80: {"values": 4096, "warps": 4, "tiles": 4}},
    valid=lambda setting: setting.values >= 512 * setting.warps,
)
SPACES = (SUMS, MAPS)
# Tiles that the summing kernels load at once: 64 bytes per thread and tile pair of bfloat16.
AHEAD = tl.constexpr(4)


@triton.jit
def _at(row, last, o_c, C):
    """Offsets of rows of a map [pixels, C], and the mask of values that exist."""
    return row[:, None] * C + o_c[None, :], (row < last)[:, None] & (o_c < C)[None, :]


@triton.jit
def _shift(shift, o_c, C, SHIFTED: tl.constexpr):
    """The bias of the preceding convolution, or zeros."""
    if SHIFTED:
        by = tl.load(shift + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    else:
        by = tl.zeros(o_c.shape, tl.float32)
    return by


@triton.jit
def _wide(v, by, SHIFTED: tl.constexpr):
    """Values in float32, after adding the convolution's bias and rounding to their dtype."""
    if SHIFTED:
        v = (v.to(tl.float32) + by[None, :]).to(v.dtype)
    return v.to(tl.float32)


@triton.jit
def _partial(
    x, shift, partial, PIXELS, C, CHUNK,
    ROWS: tl.constexpr, C_P: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Compute each channel's mean and sum of squared differences over a chunk of pixels."""
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x += image * PIXELS * C
    begin = chunk * CHUNK
    last = tl.minimum(begin + CHUNK, PIXELS)
    o_row, o_c = tl.arange(0, ROWS), tl.arange(0, C_P)
    by = _shift(shift, o_c, C, SHIFTED)
    # Each position of the tile keeps its own sums, of differences from the first value it meets.
    # Measured in deviations, that value is so close to the position's mean that at most the digits
    # of the number of tiles cancel (group_norm_silu.md).
    at, m = _at(begin + o_row, last, o_c, C)
    first = tl.load(x + at, mask=m, other=0.0)
    origin = _wide(first, by, SHIFTED)
    sums, squares = tl.zeros((ROWS, C_P), tl.float32), tl.zeros((ROWS, C_P), tl.float32)
    for turn in range(begin + ROWS, last, ROWS * AHEAD):
        for i in tl.static_range(AHEAD):
            at, m = _at(turn + i * ROWS + o_row, last, o_c, C)
            # A masked value has a difference of zero.
            away = _wide(tl.load(x + at, mask=m, other=first), by, SHIFTED) - origin
            sums += away
            squares += away * away
    # Then combine the positions, of ``n`` pixels each (Chan, Golub and LeVeque).
    n = tl.maximum(last - begin - o_row + ROWS - 1, 0) // ROWS
    each = (1.0 / tl.maximum(n, 1).to(tl.float32))[:, None]
    n = n.to(tl.float32)[:, None]
    means = origin + sums * each
    mean = tl.sum(means * (n / (last - begin)), axis=0)
    away = means - mean[None, :]
    # squares - sums * sums / n: rounding alone may make it negative.
    squares = tl.maximum(squares - sums * (sums * each), 0.0)
    squares = tl.sum(tl.where(n > 0.0, squares + n * (away * away), 0.0), axis=0)
    partial += (image * tl.num_programs(0) + chunk) * 2 * C
    tl.store(partial + o_c, mean, mask=o_c < C)
    tl.store(partial + C + o_c, squares, mask=o_c < C)


@triton.jit
def _combine(
    partial, mean, rstd, PIXELS, C, CHUNK, COUNT, eps,
    WIDTH: tl.constexpr, WIDTH_P: tl.constexpr, COUNT_P: tl.constexpr,
):  # fmt: skip
    """Compute mean and 1 / deviation of one group of one image."""
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k, c = tl.arange(0, COUNT_P), tl.arange(0, WIDTH_P)
    m = (k < COUNT)[:, None] & (c < WIDTH)[None, :]
    at = partial + image * COUNT * 2 * C + k[:, None] * 2 * C + group * WIDTH + c[None, :]
    means = tl.load(at, mask=m, other=0.0)
    squares = tl.load(at + C, mask=m, other=0.0)
    n = tl.minimum(PIXELS - k * CHUNK, CHUNK).to(tl.float32)[:, None]
    total = PIXELS * WIDTH
    middle = tl.sum(tl.sum(tl.where(m, means * (n / total), 0.0), axis=1), axis=0)
    away = means - middle
    parts = tl.where(m, squares + n * away * away, 0.0)
    variance = tl.sum(tl.sum(parts, axis=1), axis=0) / total
    at = image * tl.num_programs(0) + group
    tl.store(mean + at, middle)
    tl.store(rstd + at, 1.0 / tl.sqrt_rn(variance + eps))


@triton.jit
def _channels(mean, rstd, weight, bias, image, o_c, C, GROUPS, WIDTH: tl.constexpr):
    """Mean, 1 / deviation, weight and bias of every channel."""
    m = o_c < C
    at = image * GROUPS + o_c // WIDTH
    return (
        tl.load(mean + at, mask=m, other=0.0),
        tl.load(rstd + at, mask=m, other=0.0),
        tl.load(weight + o_c, mask=m, other=0.0).to(tl.float32),
        tl.load(bias + o_c, mask=m, other=0.0).to(tl.float32),
    )


@triton.jit
def _normalize(
    x, shift, weight, bias, mean, rstd, out, PIXELS, C, GROUPS,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, C_P: tl.constexpr, TILES: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x, out = x + image * PIXELS * C, out + image * PIXELS * C
    o_c = tl.arange(0, C_P)
    middle, scale, w, b = _channels(mean, rstd, weight, bias, image, o_c, C, GROUPS, WIDTH)
    by, scale = _shift(shift, o_c, C, SHIFTED), scale * w
    begin = chunk * (ROWS * TILES)
    for turn in range(begin, tl.minimum(begin + ROWS * TILES, PIXELS), ROWS):
        at, m = _at(turn + tl.arange(0, ROWS), PIXELS, o_c, C)
        v = _wide(tl.load(x + at, mask=m, other=0.0), by, SHIFTED)
        y = (v - middle[None, :]) * scale[None, :] + b[None, :]
        tl.store(out + at, y * _sigmoid(y), mask=m)


@triton.jit
def _before_silu(grad, x, at, m, by, middle, scale, w, b, SHIFTED: tl.constexpr):
    """Normalised values, and the gradient of the input of SiLU; 0 where masked."""
    v = _wide(tl.load(x + at, mask=m, other=0.0), by, SHIFTED)
    g = tl.load(grad + at, mask=m, other=0.0).to(tl.float32)
    normed = (v - middle[None, :]) * scale[None, :]
    y = normed * w[None, :] + b[None, :]
    s = _sigmoid(y)
    return normed, g * s * (1.0 + y * (1.0 - s))


@triton.jit
def _grad_partial(
    grad, x, shift, weight, bias, mean, rstd, partial, PIXELS, C, CHUNK, GROUPS,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, C_P: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of bias and weight over the pixels of a chunk."""
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x, grad = x + image * PIXELS * C, grad + image * PIXELS * C
    o_c = tl.arange(0, C_P)
    middle, scale, w, b = _channels(mean, rstd, weight, bias, image, o_c, C, GROUPS, WIDTH)
    by = _shift(shift, o_c, C, SHIFTED)
    by_bias, by_weight = tl.zeros((ROWS, C_P), tl.float32), tl.zeros((ROWS, C_P), tl.float32)
    begin = chunk * CHUNK
    last = tl.minimum(begin + CHUNK, PIXELS)
    for turn in range(begin, last, ROWS * AHEAD):
        for i in tl.static_range(AHEAD):
            at, m = _at(turn + i * ROWS + tl.arange(0, ROWS), last, o_c, C)
            normed, g = _before_silu(grad, x, at, m, by, middle, scale, w, b, SHIFTED)
            by_bias += g
            by_weight += g * normed
    partial += (image * tl.num_programs(0) + chunk) * 2 * C
    tl.store(partial + o_c, tl.sum(by_bias, axis=0), mask=o_c < C)
    tl.store(partial + C + o_c, tl.sum(by_weight, axis=0), mask=o_c < C)


@triton.jit
def _grad(
    grad, x, shift, weight, bias, mean, rstd, means, out, PIXELS, C, GROUPS,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, C_P: tl.constexpr, TILES: tl.constexpr,
    SHIFTED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x.

    ``means`` [B, 2, GROUPS]: the group means of g, the gradient of the normalised values, and of
    g times the normalised values.
    """
    chunk, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    x, grad, out = x + image * PIXELS * C, grad + image * PIXELS * C, out + image * PIXELS * C
    o_c = tl.arange(0, C_P)
    middle, scale, w, b = _channels(mean, rstd, weight, bias, image, o_c, C, GROUPS, WIDTH)
    by = _shift(shift, o_c, C, SHIFTED)
    means += image * 2 * GROUPS + o_c // WIDTH
    plain = tl.load(means, mask=o_c < C, other=0.0)
    along = tl.load(means + GROUPS, mask=o_c < C, other=0.0)
    begin = chunk * (ROWS * TILES)
    for turn in range(begin, tl.minimum(begin + ROWS * TILES, PIXELS), ROWS):
        at, m = _at(turn + tl.arange(0, ROWS), PIXELS, o_c, C)
        normed, g = _before_silu(grad, x, at, m, by, middle, scale, w, b, SHIFTED)
        d = (g * w[None, :] - plain[None, :] - normed * along[None, :]) * scale[None, :]
        tl.store(out + at, d, mask=m)


def unsupported_reason(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> str | None:
    """Why this cannot take the call, or None."""
    return unsupported_map(x)


def unsupported_map(x: Tensor, channels: int = 1) -> str | None:
    """Why this cannot take the map x, or a map of ``channels`` of the same size, or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {x.dtype}"
    if (channels := max(channels, x.shape[1])) > 2048:
        return f"it takes at most 2048 channels, not {channels}"
    # Within an image, and up to a tile beyond it, the kernels use 32-bit indices.
    if channels * x.shape[2:].numel() >= 2**30:
        return "it takes less than 2^30 values per image"
    if x.shape[0] >= 2**16:
        return f"it takes less than 2^16 images, not {x.shape[0]}"
    return None


def tuning_key(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> tuple[str, int]:
    """Kind and size under which a measurement is stored; see `tuning`."""
    return _key(x)


def _key(x: Tensor) -> tuple[str, int]:
    return f"{str(x.dtype).removeprefix('torch.')} C={x.shape[1]}", x.shape[0] * x.shape[2:].numel()


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    """See `vfmtok_fast.ops.group_norm_silu`; takes calls that `unsupported_reason` accepts."""
    return norm_silu(x, None, weight, bias, num_groups, eps)


def norm_silu(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, num_groups: int, eps: float
) -> Tensor:
    """`group_norm_silu` of x + shift [C]; the sum is never written to memory."""
    # Copies only if x is not channels last.
    x = x.contiguous(memory_format=torch.channels_last)
    return torch.ops.vfmtok_fast.group_norm_silu_triton(x, shift, weight, bias, num_groups, eps)[0]


def _rows(values: int, C: int, pixels: int) -> dict[str, int]:
    """Rows and width of a tile of ``values`` values."""
    wide = triton.next_power_of_2(C)
    rows = max(1, min(values // wide, triton.next_power_of_2(max(1, pixels))))
    return {"ROWS": rows, "C_P": wide}


def _sums_grid(x: Tensor) -> tuple[dict[str, int], dict[str, int], int]:
    """Arguments and constants of a kernel that sums, and the number of chunks per image."""
    setting = SUMS.at(x.device, *_key(x))
    C, pixels = x.shape[1], x.shape[2:].numel()
    constants = _rows(setting.values, C, pixels)
    rows = constants["ROWS"]
    chunk = triton.cdiv(triton.cdiv(pixels, setting.chunks), rows) * rows
    numbers = {"PIXELS": pixels, "C": C, "CHUNK": chunk}
    return numbers, {**constants, "num_warps": setting.warps}, triton.cdiv(pixels, chunk)


def maps_grid(x: Tensor, pixels: int) -> tuple[dict[str, int], int]:
    """Constants of a kernel that writes maps like x, and its number of programs for ``pixels``."""
    setting = MAPS.at(x.device, *_key(x))
    constants = _rows(setting.values, x.shape[1], pixels)
    programs = triton.cdiv(pixels, constants["ROWS"] * setting.tiles)
    return {**constants, "TILES": setting.tiles, "num_warps": setting.warps}, programs


def _forward(
    x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and mean and 1 / deviation as float32 [B, groups]."""
    B, C = x.shape[:2]
    out = torch.empty_like(x, memory_format=torch.channels_last)
    mean = torch.empty(B, groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if x.numel() == 0:
        return out, mean.zero_(), rstd.zero_()
    numbers, constants, count = _sums_grid(x)
    partial = torch.empty(B, count, 2, C, dtype=torch.float32, device=x.device)
    width, shifted, pixels = C // groups, shift is not None, numbers["PIXELS"]
    maps, programs = maps_grid(x, pixels)
    by = x if shift is None else shift.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    with on(x.device):
        _partial[(count, B)](x, by, partial, **numbers, SHIFTED=shifted, **constants)
        _combine[(groups, B)](
            partial, mean, rstd, **numbers, COUNT=count, eps=eps, WIDTH=width,
            WIDTH_P=triton.next_power_of_2(width), COUNT_P=triton.next_power_of_2(count),
        )  # fmt: skip
        _normalize[(programs, B)](
            x, by, weight, bias, mean, rstd, out, pixels, C, groups, WIDTH=width, SHIFTED=shifted,
            **maps,
        )  # fmt: skip
    return out, mean, rstd


def _backward_launch(
    grad: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor,
    rstd: Tensor, groups: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of x, weight and bias; the latter two in float32."""
    B, C = x.shape[:2]
    grad = grad.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    if x.numel() == 0:
        return out, *torch.zeros(2, C, dtype=torch.float32, device=x.device).unbind()
    numbers, constants, count = _sums_grid(x)
    pixels = numbers["PIXELS"]
    maps, programs = maps_grid(x, pixels)
    partial = torch.empty(B, count, 2, C, dtype=torch.float32, device=x.device)
    width, by = C // groups, x if shift is None else shift.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    same = {"WIDTH": width, "SHIFTED": shift is not None}
    given = (grad, x, by, weight, bias, mean, rstd)
    with on(x.device):
        _grad_partial[(count, B)](*given, partial, **numbers, GROUPS=groups, **same, **constants)
        sums = partial.sum(1)
        means = (sums * weight.float()).view(B, 2, groups, width).sum(-1)
        means /= pixels * width
        _grad[(programs, B)](*given, means, out, pixels, C, groups, **same, **maps)
    by_bias, by_weight = sums.sum(0).unbind()
    return out, by_weight.clone(), by_bias.clone()


def _setup(ctx, inputs: tuple, output: tuple) -> None:
    x, shift, weight, bias, ctx.groups, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, shift, weight, bias, mean, rstd)


def _backward(ctx, grad: Tensor, *unused: Tensor | None):
    x, shift, weight, bias, mean, rstd = ctx.saved_tensors
    by_x, by_weight, by_bias = torch.ops.vfmtok_fast.group_norm_silu_triton_grad(
        grad, x, shift, weight, bias, mean, rstd, ctx.groups
    )
    by_shift = None
    if shift is not None:
        by_shift = by_x.sum((0, 2, 3), dtype=torch.float32).to(shift.dtype)
    return by_x, by_shift, by_weight.to(weight.dtype), by_bias.to(bias.dtype), None, None


def _like_map(x: Tensor, shift, weight, bias, groups: int, eps):
    out = torch.empty_like(x, memory_format=torch.channels_last)
    mean = x.new_empty(x.shape[0], groups, dtype=torch.float32)
    return out, mean, torch.empty_like(mean)


def _like_gradients(grad, x: Tensor, shift, weight: Tensor, *unused):
    by_weight = weight.new_empty(weight.shape, dtype=torch.float32)
    out = torch.empty_like(x, memory_format=torch.channels_last)
    return out, by_weight, torch.empty_like(by_weight)


registered(
    "group_norm_silu_triton(Tensor x, Tensor? shift, Tensor weight, Tensor bias, int groups, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    _like_map,
)(_forward)
registered(
    "group_norm_silu_triton_grad(Tensor grad, Tensor x, Tensor? shift, Tensor weight, Tensor bias, "
    "Tensor mean, Tensor rstd, int groups) -> (Tensor, Tensor, Tensor)",
    _like_gradients,
)(_backward_launch)
differentiable(
    "group_norm_silu_triton",
    _setup,
    _backward,
    without="group_norm_silu and residual_block",
)
