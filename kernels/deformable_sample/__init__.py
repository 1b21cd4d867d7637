"""Triton `ops.deformable_sample`: softmax, locations, sampling and weighted sum in one launch.

What it computes: out[b, q, h] = sum over levels and points of a * v(x, y) [D], where a is a softmax
over the L*P logits of (b, q, h) and v the bilinear value at reference * size + offset - 1/2. One
launch forward, three backward; see `forward` and `backward`. Nothing of size [B, Q, H, L, P, D] is
written, and no gradient is accumulated with atomics unless ``deterministic=False`` is given.

Bytes for B=64, Q=256, H=8, L=P=4, D=64, four levels of 24 x 24 in bfloat16: 151 MB of values and
27 MB of the rest, so 42 us forward at an H200's 4.3 TB/s, and twice that backward. README.md has
the derivation, the measurements, the predictions and the rejected variants.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..launch import on
from ..registered import differentiable, registered
from ..tuning import Space
from .backward import SIDE, _add_value, _grad_samples, _grad_value, _sort
from .forward import _gather
from .places import LARGEST_SIDE, word

# ``values``: queries times channels of a head per gathering program; ``corners``: how many of the
# four pixels of a sample are in flight at once.
_GATHERING = {"values": (2048, 4096), "warps": (4, 8), "corners": (1, 4)}


def _fits(setting) -> bool:
    """16 float32 sums per thread: 8 would repeat some work, and 32 do not fit in float32."""
    return setting.values == 512 * setting.warps


GATHER = Space(
    "deformable_sample.gather",
    _GATHERING,
    {80: {"values": 2048, "warps": 4, "corners": 1}},
    valid=_fits,
)
SAMPLES = Space(
    "deformable_sample.samples",
    _GATHERING,
    {
        80: {"values": 2048, "warps": 4, "corners": 1},
        90: {"values": 2048, "warps": 4, "corners": 4},
    },
    valid=_fits,
)
ADD = Space(
    "deformable_sample.add",
    {"values": (2048, 4096), "warps": (4, 8)},
    {80: {"values": 2048, "warps": 4}},
    valid=_fits,
)
# ``group``: lists that one program writes; ``chunk``: samples that it reads at a time.
SORT = Space(
    "deformable_sample.sort",
    {"group": (8, 16, 32), "chunk": (512, 1024, 2048), "warps": (4,)},
    {80: {"group": 16, "chunk": 1024, "warps": 4}},
)
# A program has ``height`` rows of ``tiles`` adjacent tiles; one product takes ``step`` samples.
VALUE = Space(
    "deformable_sample.value",
    {"height": (2, 4, 8), "tiles": (1, 3), "step": (32, 64), "warps": (4, 8)},
    {80: {"height": 4, "tiles": 3, "step": 64, "warps": 4}},
    bits=("height", "step"),
    valid=lambda setting: (setting.warps == 8) == (setting.height == 8),
)
# For float32: three products of TF32 parts, or multiply-adds. Both take more registers.
VALUE_FLOAT32 = Space(
    "deformable_sample.value_float32",
    {
        "height": (2, 4),
        "tiles": (1, 3),
        "step": (32,),
        "warps": (4,),
        "precision": ("tf32x3", "ieee"),
    },
    {80: {"height": 2, "tiles": 3, "step": 32, "warps": 4, "precision": "tf32x3"}},
    bits=("height", "precision"),
)
SPACES = (GATHER, SAMPLES, SORT, VALUE, VALUE_FLOAT32, ADD)


def unsupported_reason(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], reference_points: Tensor,
    offsets: Tensor, attention_logits: Tensor, deterministic: bool = True,
) -> str | None:  # fmt: skip
    """Why this cannot take the call, or None."""
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {value.dtype}"
    if not 1 <= value.shape[3] <= 128:
        return f"it takes heads of dimension 1 to 128, not {value.shape[3]}"
    if not 1 <= attention_logits.shape[3] <= 256:
        return f"it takes 1 to 256 samples per query, not {attention_logits.shape[3]}"
    if max(max(shape) for shape in spatial_shapes) > LARGEST_SIDE:
        return f"it takes levels of at most {LARGEST_SIDE} pixels along a side"
    # Within an image the kernels use 32-bit indices.
    if value.shape[1:].numel() >= 2**31:
        return "it takes less than 2^31 values per image"
    queries = offsets.shape[1] * value.shape[2]
    if max(offsets.shape[1:].numel(), queries * value.shape[3]) >= 2**31:
        return "it takes less than 2^31 offsets and results per image"
    return None


def tuning_key(
    value: Tensor,
    spatial_shapes: tuple[tuple[int, int], ...],
    reference_points: Tensor,
    offsets: Tensor,
    attention_logits: Tensor,
    deterministic: bool = True,
) -> tuple[str, int]:
    """Kind and size under which a measurement is stored; see `tuning`."""
    return _key(value.dtype, value.shape[1], value.shape[3], offsets)


def _key(dtype: torch.dtype, pixels: int, D: int, offsets: Tensor) -> tuple[str, int]:
    B, Q, H, L, P, _ = offsets.shape
    kind = str(dtype).removeprefix("torch.")
    pixels = triton.next_power_of_2(pixels)
    return f"{kind} D={D} samples={L * P} pixels={pixels}", B * Q * H


def deformable_sample(
    value: Tensor, spatial_shapes: tuple[tuple[int, int], ...], reference_points: Tensor,
    offsets: Tensor, attention_logits: Tensor, deterministic: bool = True,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.deformable_sample`; takes calls that `unsupported_reason` accepts."""
    sides = [side for shape in spatial_shapes for side in shape]
    return torch.ops.vfmtok_fast.deformable_sample_triton(
        value, sides, reference_points, offsets, attention_logits, deterministic
    )


def _levels(sides: list[int]) -> list[tuple[int, int]]:
    return list(zip(sides[::2], sides[1::2], strict=True))


def _constants(offsets: Tensor, dim: int, smallest: int = 1) -> dict[str, int]:
    L, P = offsets.shape[3:5]
    return {"L": L, "P": P, "D": dim, "C": max(smallest, triton.next_power_of_2(dim))}


def _gathering(setting, offsets: Tensor, dim: int, kept: int = 0) -> dict[str, int]:
    """Constants of a kernel over queries that keeps ``kept`` numbers per sample in registers."""
    constants, Q = _constants(offsets, dim), offsets.shape[1]
    step = min(4, triton.next_power_of_2(constants["P"]))
    samples = constants["L"] * triton.cdiv(constants["P"], step) * step
    most = min(128, 4096 // (kept * samples) if kept else 128, triton.next_power_of_2(Q))
    rows = max(1, min(setting.values // max(64, constants["C"]), most))
    rows = 1 << (rows.bit_length() - 1)  # a power of two, as tl.arange requires
    # Each thread must have at least one sample to locate and 16 bytes to load; otherwise threads
    # would duplicate work.
    loads = rows * constants["C"] * offsets.itemsize // 16
    warps = max(1, min(setting.warps, step * rows // 32, loads // 32))
    return {**constants, "STEP": step, "ROWS": rows, "num_warps": warps}


def _in_words(value: Tensor) -> bool:
    """Whether values can be loaded two at a time, as 32-bit words."""
    aligned = value.shape[3] % 2 == 0 and value.data_ptr() % 4 == 0
    return value.dtype == torch.bfloat16 and aligned


def _forward(
    value: Tensor, sides: list[int], points: Tensor, offsets: Tensor, logits: Tensor,
    deterministic: bool,
) -> Tensor:  # fmt: skip
    value, points, offsets, logits = (x.contiguous() for x in (value, points, offsets, logits))
    (B, S, H, D), Q = value.shape, offsets.shape[1]
    out = torch.empty(B, Q, H * D, dtype=value.dtype, device=value.device)
    if out.numel() == 0:
        return out
    words = tuple(word(*level) for level in _levels(sides))
    setting = GATHER.at(value.device, *_key(value.dtype, S, D, offsets))
    constants = _gathering(setting, offsets, D)
    with on(value.device):
        _gather[(B * H * triton.cdiv(Q, constants["ROWS"]),)](
            value, points, offsets, logits, out, words, S, Q, H, points.shape[0],
            ALL=triton.next_power_of_2(logits.shape[3]), WORDS=_in_words(value),
            CORNERS=setting.corners, **constants,
        )  # fmt: skip
    return out


def _backward_samples(
    grad: Tensor, value: Tensor, sides: list[int], points: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute gradients of offsets and logits, the softmax's log-sum-exp, and lines for `_sort`.

    The last two are float32 [B, Q, H] and int16 [B, H, L, Q*P].
    """
    grad, value = grad.contiguous(), value.contiguous()
    points, offsets, logits = (x.contiguous() for x in (points, offsets, logits))
    (B, S, H, D), (Q, _, L, P) = value.shape, offsets.shape[1:5]
    grad_offsets, grad_logits = torch.empty_like(offsets), torch.empty_like(logits)
    log_sum = torch.empty(B, Q, H, dtype=torch.float32, device=value.device)
    lines = torch.empty(B, H, L, Q * P, dtype=torch.int16, device=value.device)
    if log_sum.numel() == 0:
        return grad_offsets, grad_logits, log_sum, lines
    setting = SAMPLES.at(value.device, *_key(value.dtype, S, D, offsets))
    constants = _gathering(setting, offsets, D, kept=2)
    chunks = triton.next_power_of_2(L * triton.cdiv(P, constants["STEP"]))
    words = tuple(word(*level) for level in _levels(sides))
    with on(value.device):
        _grad_samples[(B * H * triton.cdiv(Q, constants["ROWS"]),)](
            grad, value, points, offsets, logits, grad_offsets, grad_logits, log_sum, lines, words,
            S, Q, H, points.shape[0], ALL=triton.next_power_of_2(logits.shape[3]), CHUNKS=chunks,
            WORDS=_in_words(value), CORNERS=setting.corners, **constants,
        )  # fmt: skip
    return grad_offsets, grad_logits, log_sum, lines


def _backward_value(
    grad: Tensor, sides: list[int], points: Tensor, offsets: Tensor, logits: Tensor,
    log_sum: Tensor, lines: Tensor, dim: int, deterministic: bool,
) -> Tensor:  # fmt: skip
    """Compute the gradient of the values."""
    grad, points, offsets, logits = (x.contiguous() for x in (grad, points, offsets, logits))
    B, Q, H = offsets.shape[:3]
    pixels = sum(height * width for height, width in _levels(sides))
    if B * H == 0 or not Q:
        return torch.zeros(B, pixels, H, dim, dtype=grad.dtype, device=grad.device)
    key = _key(grad.dtype, pixels, dim, offsets)
    # Checked when the op runs: the mode may change after a graph was compiled.
    form = _sorted if deterministic or torch.are_deterministic_algorithms_enabled() else _added
    return form(grad, _levels(sides), points, offsets, logits, log_sum, lines, dim, key)


def _sorted(
    grad: Tensor, levels: list[tuple[int, int]], points: Tensor, offsets: Tensor, logits: Tensor,
    log_sum: Tensor, lines: Tensor, dim: int, key: tuple[str, int],
) -> Tensor:  # fmt: skip
    """Sum for every pixel in one fixed order: by row of the sample, query and point."""
    B, Q, H, L, P, _ = offsets.shape
    S, device = sum(height * width for height, width in levels), grad.device
    single = grad.dtype == torch.float32
    sort, setting = SORT.at(device, *key), (VALUE_FLOAT32 if single else VALUE).at(device, *key)
    side, height = SIDE.value, setting.height
    # The number of lists, as in `_last_bin`, plus one entry for the end of the last list.
    bins = [rows // height * 2 + min(rows % height, 1) + 2 for rows, _ in levels]
    order = torch.empty(B, H, L, Q * P, dtype=torch.int32, device=device)
    starts = torch.empty(B, H, sum(bins), dtype=torch.int32, device=device)
    grad_value = torch.empty(B, S, H, dim, dtype=grad.dtype, device=device)
    words = tuple(word(*level) for level in levels)
    groups = sum(triton.cdiv(n, sort.group) for n in bins)
    # No more tiles than the widest level has, and one tile if rows are too wide for registers.
    constants = _constants(offsets, dim, smallest=16)
    widest = max(triton.cdiv(width, side) for _, width in levels)
    tiles = min(widest, setting.tiles if constants["C"] <= 64 else 1)
    strips = sum(triton.cdiv(h, height) * triton.cdiv(w, side * tiles) for h, w in levels)
    with on(device):
        _sort[(B * H * groups,)](
            lines, order, starts, words, Q * P, groups, sum(bins), L=L, HEIGHT=height,
            CHUNK=sort.chunk, GROUP=sort.group, WHOLE=Q * P <= sort.chunk, num_warps=sort.warps,
        )  # fmt: skip
        _grad_value[(B * H * strips,)](
            grad, points, offsets, logits, log_sum, order, starts, grad_value, words,
            S, Q, H, points.shape[0], strips, sum(bins), **constants, HEIGHT=height, TILES=tiles,
            STEP=setting.step, num_warps=setting.warps, num_stages=1,
            PRECISION=setting.precision if single else "ieee",
        )  # fmt: skip
    return grad_value


def _added(
    grad: Tensor, levels: list[tuple[int, int]], points: Tensor, offsets: Tensor, logits: Tensor,
    log_sum: Tensor, lines: Tensor, dim: int, key: tuple[str, int],
) -> Tensor:  # fmt: skip
    """Sum for every pixel in the order in which the atomic additions happen to run."""
    B, Q, H = offsets.shape[:3]
    S = sum(height * width for height, width in levels)
    sums = torch.zeros(B, S, H, dim, dtype=torch.float32, device=grad.device)
    setting = ADD.at(grad.device, *key)
    constants = _gathering(setting, offsets, dim)
    words = tuple(word(*level) for level in levels)
    with on(grad.device):
        _add_value[(B * H * triton.cdiv(Q, constants["ROWS"]),)](
            grad, points, offsets, logits, log_sum, sums, words, S, Q, H, points.shape[0],
            **constants,
        )  # fmt: skip
    return sums.to(grad.dtype)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    value, ctx.sides, points, offsets, logits, ctx.deterministic = inputs
    ctx.save_for_backward(value, points, offsets, logits)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, points, offsets, logits = ctx.saved_tensors
    ops = torch.ops.vfmtok_fast
    by_offsets, by_logits, log_sum, lines = ops.deformable_sample_triton_samples(
        grad, value, ctx.sides, points, offsets, logits
    )
    by_value = by_points = None
    if ctx.needs_input_grad[0]:
        by_value = ops.deformable_sample_triton_value(
            grad, ctx.sides, points, offsets, logits, log_sum, lines, value.shape[3],
            ctx.deterministic,
        )  # fmt: skip
    if ctx.needs_input_grad[2]:
        # A reference point moves all samples of its level, scaled by the level's size in pixels.
        # Sizes are numbers: a tensor would be copied from the host, which graph capture forbids.
        moved = by_offsets.sum(dim=(2, 4), dtype=torch.float32)
        by_level = [
            torch.stack((xy[..., 0] * width, xy[..., 1] * height), dim=-1)
            for xy, (height, width) in zip(moved.unbind(2), _levels(ctx.sides), strict=True)
        ]
        by_points = torch.stack(by_level, dim=2).to(points.dtype).sum_to_size(points.shape)
    return by_value, None, by_points, by_offsets, by_logits, None


def _like_queries(value: Tensor, sides, points, offsets: Tensor, logits, deterministic) -> Tensor:
    return value.new_empty(value.shape[0], offsets.shape[1], value.shape[2] * value.shape[3])


def _like_samples(grad, value, sides, points, offsets: Tensor, logits: Tensor):
    B, Q, H, L, P, _ = offsets.shape
    log_sum = offsets.new_empty(B, Q, H, dtype=torch.float32)
    lines = offsets.new_empty(B, H, L, Q * P, dtype=torch.int16)
    return torch.empty_like(offsets), torch.empty_like(logits), log_sum, lines


def _like_value(
    grad: Tensor, sides, points, offsets: Tensor, logits, log_sum, lines, dim: int, deterministic
) -> Tensor:
    pixels = sum(height * width for height, width in _levels(sides))
    return grad.new_empty(offsets.shape[0], pixels, offsets.shape[2], dim)


for _name, _schema, _launch, _fake in (
    ("", "(Tensor value, int[] sides, Tensor points, Tensor offsets, Tensor logits, "
     "bool deterministic) -> Tensor", _forward, _like_queries),
    ("_samples", "(Tensor grad, Tensor value, int[] sides, Tensor points, Tensor offsets, "
     "Tensor logits) -> (Tensor, Tensor, Tensor, Tensor)", _backward_samples, _like_samples),
    ("_value", "(Tensor grad, int[] sides, Tensor points, Tensor offsets, Tensor logits, "
     "Tensor log_sum, Tensor lines, int dim, bool deterministic) -> Tensor",
     _backward_value, _like_value),
):  # fmt: skip
    registered(f"deformable_sample_triton{_name}{_schema}", _fake)(_launch)
differentiable("deformable_sample_triton", _setup, _backward, without="deformable_sample")
