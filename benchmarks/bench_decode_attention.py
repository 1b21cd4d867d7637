"""`ops.decode_attention` against its reference, PyTorch's attention and other libraries."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, GPU
from torch import Tensor

from vfmtok_fast import ops
from vfmtok_fast.reference.decode_attention import decode_attention as reference

DTYPE = torch.bfloat16 if GPU else torch.float32


@dataclass(frozen=True)
class Shape:
    """Rows, query and key-value heads, capacity, head dim and live positions."""

    name: str
    B: int
    H: int
    G: int
    T: int
    D: int
    length: int

    def __str__(self) -> str:
        return f"{self.name} B={self.B} H={self.H} G={self.G} T={self.T} D={self.D} n={self.length}"

    @property
    def work(self) -> harness.Work:
        heads = 2 * self.B * (self.G * self.length + self.H) * self.D
        flops = 4 * self.B * self.H * self.length * self.D
        return harness.Work(bytes=heads * DTYPE.itemsize, flops=flops)


# Guided generation of one image and of 64, halfway through; and a long cache with grouped queries.
LONG = Shape("grouped", 2, 32, 8, 32768, 128, 32768)
SHAPES = (
    (
        Shape("GPT-L", 2, 16, 16, 256, 64, 128),
        Shape("GPT-L", 128, 16, 16, 256, 64, 128),
        Shape("GPT-3B", 2, 32, 32, 256, 100, 128),
        Shape("GPT-3B", 128, 32, 32, 256, 100, 128),
        LONG,
    )
    if GPU
    else (
        Shape("GPT-L", 2, 16, 16, 256, 64, 128),
        Shape("GPT-3B", 2, 32, 32, 256, 100, 128),
        Shape("GPT-L", 16, 16, 16, 256, 64, 128),
        Shape("grouped", 2, 8, 2, 256, 64, 256),
    )
)


@functools.lru_cache(maxsize=1)
def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return q and the caches; dead positions hold NaN."""
    draw = torch.Generator().manual_seed(0)
    cache = shape.B, shape.G, shape.T, shape.D
    sizes = ((shape.B, shape.H, shape.D), cache, cache)
    q, k, v = (torch.randn(size, generator=draw).to(DEVICE, DTYPE) for size in sizes)
    k[:, :, shape.length :] = v[:, :, shape.length :] = float("nan")
    return q, k, v


@functools.lru_cache(maxsize=1)
def bounds(shape: Shape) -> tuple[Tensor, float]:
    """Return the truth and the tolerance: twice the reference's error, plus one rounding."""
    q, k, v = inputs(shape)
    rows = [reference(*(x[i : i + 1].double() for x in (q, k, v)), shape.length)
            for i in range(shape.B)]  # fmt: skip
    truth = torch.cat(rows)
    error = float((reference(q, k, v, shape.length) - truth).abs().max())
    return truth, 2 * error + torch.finfo(DTYPE).eps * float(truth.abs().max())


def torch_sdpa(q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
    """PyTorch's attention at its best: over the live positions, whose number the host knows."""
    k, v = k[:, :, :length], v[:, :, :length]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


@functools.cache
def compiled() -> Callable:
    return torch.compile(ops.decode_attention)


def provider_module(provider: str) -> ModuleType:
    name = provider.replace("-", "_")
    return importlib.import_module(f"vfmtok_fast.providers.decode_attention_{name}")


PROVIDERS: dict[str, Callable[[], Callable]] = {
    "reference": lambda: ops.decode_attention,
    "reference compiled": compiled,
    "torch SDPA": lambda: torch_sdpa,
    "fast": lambda: ops.decode_attention,
    "fast, length on the device": lambda: ops.decode_attention,
    "flash-attn": lambda: provider_module("flash-attn").decode_attention,
    "xformers": lambda: provider_module("xformers").decode_attention,
}


def needs(provider: str, shape: Shape) -> str | None:
    """Return why a provider cannot run here, or None."""
    if provider not in ("flash-attn", "xformers"):
        return None
    if not GPU:
        return f"{provider} needs a GPU"
    try:
        module = provider_module(provider)
    except ImportError:
        return f"{provider} is not installed"
    return module.unsupported_reason(*inputs(shape), shape.length)


def checked(shape: Shape, got: Tensor) -> dict[str, object]:
    truth, allowed = bounds(shape)
    error = float((got - truth).abs().max())
    assert error <= allowed, f"off by {error:.2e}, allowed {allowed:.2e}"
    return {"error": error, "allowed": allowed, "dtype": str(DTYPE).removeprefix("torch.")}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_decode_attention(benchmark, shape: Shape, provider: str):
    if reason := needs(provider, shape):
        pytest.skip(reason)
    q, k, v = inputs(shape)
    length: int | Tensor = shape.length
    if provider == "fast, length on the device":
        length = torch.tensor([length], device=DEVICE)
    attend = PROVIDERS[provider]()
    harness.measure(
        benchmark,
        op="decode_attention",
        shape=str(shape),
        provider=provider,
        fn=lambda: attend(q, k, v, length),
        check=lambda got: checked(shape, got),
        work=shape.work,
        enabled="decode_attention" if provider.startswith("fast") else None,
    )
