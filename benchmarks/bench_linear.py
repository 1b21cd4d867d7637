"""`ops.linear` against its reference, for the layers of the encoder."""

from __future__ import annotations

import functools

import harness
import pytest
import torch
from harness import DEVICE, GPU
from torch import Tensor

from vfmtok_fast import ops
from vfmtok_fast.reference.linear import linear as reference

# Rows per image, K, N and activation.
LAYERS = {
    "ViT fc1": (581, 1024, 4096, "gelu"),
    "ViT qkv": (581, 1024, 3072, None),
    "ViT fc2": (581, 4096, 1024, None),
    "region value": (2304, 512, 512, None),
    "region up": (256, 512, 1024, "relu"),
    "region query": (256, 512, 512, None),
}
BATCH = 64 if GPU else 4
# Number of result rows compared with float64.
SOME = 64


@functools.lru_cache(maxsize=1)
def inputs(name: str, dtype: torch.dtype) -> list[Tensor]:
    rows, K, N, _ = LAYERS[name]
    draw = torch.Generator(DEVICE).manual_seed(0)
    sizes = ((rows * BATCH, K), (N, K), (N,))
    x, weight, bias = (torch.randn(s, generator=draw, device=DEVICE) for s in sizes)
    return [x.to(dtype), (weight / K**0.5).to(dtype), bias.to(dtype)]


def call(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    return ops.linear(x, weight, bias, activation=activation)


PROVIDERS = harness.providers(call)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def bench_linear(benchmark, name: str, dtype: torch.dtype, provider: str):
    rows, K, N, activation = LAYERS[name]
    tensors = inputs(name, dtype)
    function = PROVIDERS[provider]()

    def check(got: Tensor) -> dict[str, object]:
        x, *parameters = tensors
        exact = reference(x[:SOME].double(), *(p.double() for p in parameters), activation)
        ruler = reference(x[:SOME], *parameters, activation)
        error, own = (float((y[:SOME] - exact).abs().max()) for y in (got, ruler))
        assert error <= 2 * own + torch.finfo(dtype).eps * float(exact.abs().max())
        return {"error": error}

    bytes_ = tensors[0].element_size() * (rows * BATCH * (K + N) + N * K)
    harness.measure(
        benchmark,
        op="linear",
        shape=f"{name} B={BATCH} {'bf16' if dtype == torch.bfloat16 else 'fp32'}",
        provider=provider,
        fn=lambda: function(*tensors, activation),
        check=check,
        work=harness.Work(bytes=bytes_, flops=2 * rows * BATCH * K * N),
        enabled="linear" if provider == "fast" else None,
    )
