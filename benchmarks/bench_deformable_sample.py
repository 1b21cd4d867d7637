"""`ops.deformable_sample` against its reference and peers, forward and with backward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import harness
import peers
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
    dtype: torch.dtype = DTYPE

    def __str__(self) -> str:
        named = "" if self.dtype == DTYPE else f" {str(self.dtype).removeprefix('torch.')}"
        return f"{self.name} B={self.B}{named}"

    @property
    def problem(self) -> str:
        """The key by which the report matches measured and predicted times."""
        sizes = f"B={self.B} Q={self.Q} H={self.H} L={len(self.levels)} P={self.P} D={self.D}"
        sides = " ".join(dict.fromkeys(f"{height}x{width}" for height, width in self.levels))
        return f"{sizes} levels {sides} {'bf16' if self.dtype == torch.bfloat16 else 'fp32'}"


REGIONS = ((24, 24),) * 4
PYRAMID = ((100, 134), (50, 67), (25, 34), (13, 17))
# The most important cases come first, because the time may run out.
BATCHES = (64, 8, 256) if GPU else (1, 2, 8)
SHAPES = [Shape("region encoder", B, 256, 64, REGIONS) for B in BATCHES]
SHAPES.append(Shape("detection", 2, 900, 32, PYRAMID))
if GPU:
    SHAPES.append(Shape("region encoder", 64, 256, 64, REGIONS, dtype=torch.float32))
# Backward has gradients for all inputs but the reference points, which are fixed in VFMTok.
PASSES = ("forward", "forward and backward")


@functools.lru_cache(maxsize=1)
def inputs(shape: Shape) -> list:
    """Make inputs with offsets of a few pixels, as in a trained model."""
    generator = torch.Generator().manual_seed(0)
    B, Q, H, L, P = shape.B, shape.Q, shape.H, len(shape.levels), shape.P

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, shape.dtype).requires_grad_()

    value = normal(B, sum(h * w for h, w in shape.levels), H, shape.D)
    points = torch.rand((1, Q, 1, 2), generator=generator).expand(1, Q, L, 2)
    points = points.contiguous().to(DEVICE, shape.dtype)
    return [value, shape.levels, points, normal(B, Q, H, L, P, 2), normal(B, Q, H, L * P)]


def images(shape: Shape) -> list[list]:
    """Split the inputs by image, in float64: all of B = 256 would take tens of gigabytes."""
    value, levels, points, offsets, logits = inputs(shape)
    return [
        [value[i : i + 1].detach().double(), levels, points.double(),
         offsets[i : i + 1].detach().double(), logits[i : i + 1].detach().double()]
        for i in range(shape.B)
    ]  # fmt: skip


@functools.lru_cache(maxsize=1)
def truth(shape: Shape) -> tuple[Tensor, float]:
    """Return the float64 output, and the largest absolute entry of ``value``."""
    out = torch.cat([reference(*arguments) for arguments in images(shape)])
    return out, float(inputs(shape)[0].detach().abs().max())


@functools.lru_cache(maxsize=1)
def true_gradients(shape: Shape) -> dict[str, Tensor]:
    """Return float64 gradients of value, offsets and logits, for a cotangent of one."""
    parts = []
    for arguments in images(shape):
        leaves = [arguments[i].requires_grad_() for i in (0, 3, 4)]
        parts.append(torch.autograd.grad(reference(*arguments).sum(), leaves))
    names = ("value", "offsets", "logits")
    every = map(torch.cat, zip(*parts, strict=True))
    return dict(zip(names, every, strict=True))


@functools.lru_cache(maxsize=1)
def locations(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Return the peers' inputs as tensors: value, shapes, starts, locations in [0, 1], logits."""
    value, levels, points, offsets, logits = (
        x.detach().to(dtype) if isinstance(x, Tensor) else x for x in inputs(shape)
    )
    sizes = torch.tensor(levels, device=DEVICE)
    pixels = sizes.prod(dim=1)
    place = points[:, :, None, :, None] + offsets / sizes.flip(1)[:, None].to(dtype)
    starts = pixels.cumsum(0) - pixels
    return [value.requires_grad_(), sizes, starts, place.requires_grad_(), logits.requires_grad_()]


PEERS = {
    # The compiled peers do not support half precision.
    "deformops": (peers.deformops, None),
    "MultiScaleDeformableAttention, float32": (peers.compiled_extension, torch.float32),
    "kernels-community, float32": (peers.from_the_hub, torch.float32),
}


def peer(name: str, shape: Shape) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return a peer's call, which takes locations, and the tensors that get gradients."""
    make, dtype = PEERS[name]
    arguments = locations(shape, dtype or shape.dtype)
    call = make()
    return lambda: call(*arguments), [arguments[i] for i in (0, 3, 4)]


@functools.cache
def compiled() -> Callable:
    return torch.compile(reference)


def ours(provider: str, shape: Shape) -> tuple[Callable[[], Tensor], list[Tensor]]:
    arguments = inputs(shape)
    call = {"reference": reference, "fast": ops.deformable_sample}.get(provider)
    if provider == "reference compiled":
        call = compiled()
    elif provider == "fast, atomics":
        call = functools.partial(ops.deformable_sample, deterministic=False)
    return lambda: call(*arguments), [arguments[i] for i in (0, 3, 4)]


PROVIDERS = ("reference", "reference compiled", "fast", "fast, atomics", *PEERS)


def needs(provider: str, shape: Shape) -> str | None:
    """Return why a provider cannot run here, or None."""
    if provider in PEERS:
        if not GPU:
            return f"{provider} needs a GPU"
        try:
            PEERS[provider][0]()
        except peers.NotHere as why:
            return str(why)
    if provider == "fast, atomics":
        if not GPU:
            return "without a GPU there are no atomics"
        if "deterministic" not in inspect.signature(ops.deformable_sample).parameters:
            return "the op has no such form"
    if provider == "reference compiled" and not GPU and str(shape) != "region encoder B=2":
        return "compiling it takes longer than all the rest"
    if "reference" in provider and GPU:
        free, _ = torch.cuda.mem_get_info()
        samples = shape.B * shape.Q * shape.H * shape.P * len(shape.levels)
        if 4 * samples * shape.D * shape.dtype.itemsize > free:
            return "its samples do not fit"
    return None


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_deformable_sample(benchmark, shape: Shape, direction: str, provider: str):
    if reason := needs(provider, shape):
        pytest.skip(reason)
    call, leaves = (peer if provider in PEERS else ours)(provider, shape)
    value, _, _, offsets, logits = inputs(shape)
    size = shape.B, shape.Q, shape.H * shape.D
    cotangent = torch.ones(size, device=DEVICE, dtype=leaves[0].dtype)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (call(),)

    def both() -> tuple[Tensor, ...]:
        out = call()
        return out, *torch.autograd.grad(out, leaves, cotangent)

    def check(got: tuple[Tensor, ...]) -> dict[str, object]:
        # In half precision, all but our kernels round locations of up to 100 pixels to 8 bits.
        eps = torch.finfo(shape.dtype).eps
        allowed = 4 * eps if provider.startswith("fast") and GPU else 400 * eps
        exact, largest = truth(shape)
        error = float((got[0].detach() - exact).abs().max()) / largest
        assert error <= allowed, error
        facts: dict[str, object] = {"max_error": float(f"{error:.1e}"), "problem": shape.problem}
        if len(got) > 1:
            facts["gradient_errors"] = errors = gradient_errors(shape, got[1:], provider in PEERS)
            # The gradient of an offset jumps at integer coordinates, where rounding picks the side.
            assert max(errors["value"], errors["logits"]) <= allowed, errors
        return facts

    element = shape.dtype.itemsize
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
        # Backward reads the inputs and the cotangent again, and writes as much as it reads.
        work=harness.Work(bytes=times * moved, flops=times * samples * 8 * shape.D),
        enabled="deformable_sample" if provider.startswith("fast") else None,
    )


def gradient_errors(shape: Shape, got: tuple[Tensor, ...], of_places: bool) -> dict[str, float]:
    """Return the relative error of each gradient: norm of the error over norm of the truth."""
    of_value, of_offsets, of_logits = got
    if of_places:  # In the unit of a location, a pixel is 1 / (width, height).
        wh = torch.tensor(shape.levels, device=DEVICE).flip(1)[:, None]
        of_offsets = of_offsets.double() / wh
    named = {"value": of_value, "offsets": of_offsets, "logits": of_logits}
    return {
        name: float(f"{float((named[name] - exact).norm() / exact.norm()):.1e}")
        for name, exact in true_gradients(shape).items()
    }
