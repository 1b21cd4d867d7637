"""`ops.linear_cross_entropy` against its reference: the loss of GPT-L's codes and its gradients.

Measures time and peak memory of forward and backward together; on a GPU also other chunk sizes.
"""

from __future__ import annotations

import functools

import harness
import pytest
import torch
from harness import DEVICE, GPU
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.reference.linear_cross_entropy import linear_cross_entropy as reference

# Rows, channels and codes: 128 and 32 images of GPT-L; on a CPU 8 images of GPT-B.
SIZES = ((32768, 1024, 16384), (8192, 1024, 16384)) if GPU else ((2048, 768, 16384),)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Number of rows compared with float64.
SOME = 256
CHUNKS = (2**25, 2**26, 2**28) if GPU else ()


@functools.lru_cache(maxsize=1)
def inputs(size: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """Return x, weight and targets."""
    N, C, V = size
    draw = torch.Generator(DEVICE).manual_seed(0)
    x, weight = (torch.randn(s, generator=draw, device=DEVICE) for s in ((N, C), (V, C)))
    targets = torch.randint(V, (N,), generator=draw, device=DEVICE)
    return [x.to(dtype).requires_grad_(), (weight / C**0.5).to(dtype).requires_grad_(), targets]


def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, weight, targets)


def call(x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    value = loss(x, weight, targets)
    return [value.detach(), *torch.autograd.grad(value, (x, weight))]


def compiled(x: Tensor, weight: Tensor, targets: Tensor) -> list[Tensor]:
    value = harness.compiled(loss)(x, weight, targets)
    return [value.detach(), *torch.autograd.grad(value, (x, weight))]


@functools.lru_cache(maxsize=1)
def truth(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of x for some rows, in float64 and by the reference."""
    x, weight, targets = inputs(size, dtype)
    found = []
    for kind in (torch.float64, dtype):
        rows = x[:SOME].detach().to(kind).requires_grad_()
        args = (rows, weight.detach().to(kind), targets[:SOME], None, -100, 0.0, "sum")
        value = reference(*args)
        found.append(torch.autograd.grad(value, rows)[0] / len(x))
    return tuple(found)


PROVIDERS = {"reference": call, "reference compiled": compiled, "fast": call}
PROVIDERS |= {f"fast, chunks of {size >> 20} MiB": call for size in CHUNKS}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"N={size[0]}")
def bench_linear_cross_entropy(benchmark, monkeypatch, size, dtype: str, provider: str):
    N, C, V = size
    other = provider.startswith("fast, ")
    if other:
        if size != SIZES[0] or dtype != "bf16":
            pytest.skip("other chunks are timed once")
        kernel = vfmtok_fast.switch.kernel("linear_cross_entropy")
        monkeypatch.setattr(kernel, "CHUNK_BYTES", int(provider.split()[-2]) << 20)
    tensors = inputs(size, DTYPES[dtype])
    function = PROVIDERS[provider]

    def check(got: list[Tensor]) -> dict[str, object]:
        exact, ruler = truth(size, DTYPES[dtype])
        error, own = (float((y[:SOME] - exact).abs().max()) for y in (got[1], ruler))
        assert error <= 2 * own + torch.finfo(DTYPES[dtype]).eps * float(exact.abs().max())
        # For random rows, all codes have about the same probability.
        assert abs(float(got[0]) - (torch.tensor(V).log().item() + 0.5)) < 0.1
        return {"error": error}

    harness.measure(
        benchmark,
        op="linear_cross_entropy",
        shape=f"N={N:,} C={C:,} V={V:,} {dtype}, forward and backward",
        provider=provider,
        fn=lambda: function(*tensors),
        check=check,
        work=harness.Work(
            bytes=2 * tensors[0].element_size() * (N * C + V * C), flops=3 * 2 * N * C * V
        ),
        enabled="linear_cross_entropy" if provider.startswith("fast") else None,
    )
