"""`ops.deformable_sample` against its reference and its peers, forward and with its backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import harness
import pytest
import torch
from harness import DEVICE, GPU
from torch import Tensor

from vfmtok_fast import ops
from vfmtok_fast.reference.deformable_sample import deformable_sample as reference

DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclass(frozen=True)
class Shape:
    name: str
    B: int
    Q: int
    D: int
    levels: tuple[tuple[int, int], ...]
    H: int = 8
    P: int = 4

    def __str__(self) -> str:
        return f"{self.name} B={self.B}"

    @property
    def problem(self) -> str:
        """As aot_cases.py words it; the report puts predicted and measured times side by side."""
        sizes = f"B={self.B} Q={self.Q} H={self.H} L={len(self.levels)} P={self.P} D={self.D}"
        sides = " ".join(dict.fromkeys(f"{height}x{width}" for height, width in self.levels))
        return f"{sizes} levels {sides} {'bf16' if DTYPE == torch.bfloat16 else 'fp32'}"


REGIONS = ((24, 24),) * 4
PYRAMID = ((100, 134), (50, 67), (25, 34), (13, 17))
BATCHES = (1, 8, 64, 256) if GPU else (1, 2, 8)
SHAPES = [Shape("region encoder", B, 256, 64, REGIONS) for B in BATCHES]
SHAPES.append(Shape("detection", 2, 900, 32, PYRAMID))
# Gradients of all inputs but the reference points, which are fixed in VFMTok.
PASSES = ("forward", "forward and backward")


@functools.lru_cache(maxsize=1)
def inputs(shape: Shape) -> list:
    """Offsets of a few pixels, as those of a trained model are."""
    generator = torch.Generator().manual_seed(0)
    B, Q, H, L, P = shape.B, shape.Q, shape.H, len(shape.levels), shape.P

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, DTYPE).requires_grad_()

    value = normal(B, sum(h * w for h, w in shape.levels), H, shape.D)
    points = torch.rand((1, Q, 1, 2), generator=generator).expand(1, Q, L, 2)
    points = points.contiguous().to(DEVICE, DTYPE)
    return [value, shape.levels, points, normal(B, Q, H, L, P, 2), normal(B, Q, H, L * P)]


@functools.lru_cache(maxsize=1)
def truth(shape: Shape) -> tuple[Tensor, float]:
    """Float64 output, and the largest value."""
    wide = [x.detach().double() if isinstance(x, Tensor) else x for x in inputs(shape)]
    # One image at a time: at B = 256 all would be tens of gigabytes.
    parts = [
        reference(wide[0][i : i + 1], wide[1], wide[2], wide[3][i : i + 1], wide[4][i : i + 1])
        for i in range(shape.B)
    ]
    return torch.cat(parts), float(wide[0].abs().max())


@functools.lru_cache(maxsize=1)
def locations(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """What peers take: shapes and starts as tensors, and finished locations in [0, 1]."""
    _, levels, points, offsets, _ = inputs(shape)
    sizes = torch.tensor(levels, device=DEVICE)
    pixels = sizes.prod(dim=1)
    place = points[:, :, None, :, None] + offsets.detach() / sizes.flip(1)[:, None].to(DTYPE)
    return sizes, pixels.cumsum(0) - pixels, place.requires_grad_()


def deformops(shape: Shape) -> Callable[..., Tensor]:
    """Its locations are given to it, which ours works out."""
    from deformops.registry import msda

    sizes, starts, place = locations(shape)

    def call(value, _levels, _points, _offsets, logits):
        return msda(value, sizes, starts, place, logits, method="softmax").flatten(2, -1)

    return call


@functools.cache
def compiled() -> Callable:
    return torch.compile(reference)


PROVIDERS: dict[str, Callable[[Shape], Callable[..., Tensor]]] = {
    "reference": lambda shape: reference,
    "reference compiled": lambda shape: compiled(),
    "fast": lambda shape: ops.deformable_sample,
    "fast, atomics": lambda shape: functools.partial(ops.deformable_sample, deterministic=False),
    "deformops": deformops,
}


def needs(provider: str, shape: Shape, direction: str) -> str | None:
    """Why a provider cannot run here, or None."""
    if provider == "fast, atomics" and (not GPU or direction == "forward"):
        return "only the gradient on a GPU differs"
    if provider == "deformops":
        if not GPU:
            return "deformops' kernels need a GPU"
        try:
            import deformops.registry  # noqa: F401
        except ImportError:
            return "deformops is not installed"
    if provider == "reference compiled" and not GPU and str(shape) != "region encoder B=2":
        return "compiling it takes longer than all the rest"
    if "reference" in provider and GPU:
        free, _ = torch.cuda.mem_get_info()
        samples = shape.B * shape.Q * shape.H * shape.P * len(shape.levels)
        if 4 * samples * shape.D * DTYPE.itemsize > free:
            return "its samples do not fit"
    return None


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_deformable_sample(benchmark, shape: Shape, direction: str, provider: str):
    if reason := needs(provider, shape, direction):
        pytest.skip(reason)
    arguments = inputs(shape)
    sample = PROVIDERS[provider](shape)
    value, _, _, offsets, logits = arguments
    leaves = [value, locations(shape)[2] if provider == "deformops" else offsets, logits]
    cotangent = torch.ones(shape.B, shape.Q, shape.H * shape.D, device=DEVICE, dtype=DTYPE)

    def forward() -> Tensor:
        with torch.no_grad():
            return sample(*arguments)

    def both() -> Tensor:
        out = sample(*arguments)
        torch.autograd.grad(out, leaves, cotangent)
        return out

    def check(out: Tensor) -> dict[str, object]:
        exact, size = truth(shape)
        error = float((out.detach() - exact).abs().max()) / size
        # In half precision all but ours round locations, up to 100 pixels, to 8 bits.
        eps = torch.finfo(DTYPE).eps
        assert error <= (4 * eps if provider.startswith("fast") and GPU else 400 * eps), error
        return {"max_error": float(f"{error:.1e}"), "problem": shape.problem}

    element = DTYPE.itemsize
    moved = element * sum(x.numel() for x in (value, offsets, logits, cotangent))
    samples = offsets.numel() // 2
    times = 1 if direction == "forward" else 3
    harness.measure(
        benchmark,
        op="deformable_sample",
        shape=f"{shape}, {direction}",
        provider=provider,
        fn=forward if direction == "forward" else both,
        check=check,
        # Backward reads the inputs and the cotangent once more and writes as much as it read.
        work=harness.Work(bytes=times * moved, flops=times * samples * 8 * shape.D),
        enabled="deformable_sample" if provider.startswith("fast") else None,
    )
