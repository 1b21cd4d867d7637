"""`ops.add_norm` against its reference, in the ViT and in the region encoder."""

from __future__ import annotations

import functools

import harness
import pytest
import torch
from harness import DEVICE, GPU
from torch import Tensor

from vfmtok_fast import ops
from vfmtok_fast.reference.add_norm import add_norm as reference

HALF = torch.bfloat16
# Rows and channels; whether LayerScale is used; dtypes of the stream, and of branch and output.
SHAPES = {
    f"{name} B={B}{kind}": (rows * B, C, scaled, stream, inner)
    for B in ((64, 8) if GPU else (4,))
    for name, rows, C, scaled in (("ViT", 581, 1024, True), ("regions", 256, 512, False))
    for kind, stream, inner in (
        (" bf16", HALF, HALF),
        (" fp32", torch.float32, torch.float32),
        (" fp32 around bf16", torch.float32, HALF),
    )
}


@functools.lru_cache(maxsize=1)
def inputs(shape: str) -> tuple:
    rows, C, scaled, stream, inner = SHAPES[shape]
    draw = torch.Generator(DEVICE).manual_seed(0)

    def new(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(size, generator=draw, device=DEVICE).to(dtype)

    weight, bias, scale = (new(C, dtype=stream) for _ in range(3))
    parts = new(rows, C, dtype=stream), new(rows, C, dtype=inner), weight, bias
    return parts, {"scale": scale if scaled else None, "eps": 1e-6, "dtype": inner}


def call(parts: tuple, options: dict) -> tuple[Tensor, Tensor]:
    return ops.add_norm(*parts, **options)


@functools.lru_cache(maxsize=1)
def truth(shape: str) -> list[Tensor]:
    parts, options = inputs(shape)
    scale = None if options["scale"] is None else options["scale"].double()
    return reference(*(part.double() for part in parts), scale, 1e-6, torch.float64)


PROVIDERS = harness.providers(call)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def bench_add_norm(benchmark, shape: str, provider: str):
    parts, options = inputs(shape)
    function = PROVIDERS[provider]()

    def check(got: tuple[Tensor, Tensor]) -> dict[str, object]:
        errors = [
            float((one - exact).abs().max() / exact.abs().max())
            for one, exact in zip(got, truth(shape), strict=True)
        ]
        # Two roundings of the sum, and their effect on a row of unit variance.
        assert max(errors) <= 4 * max(torch.finfo(one.dtype).eps for one in got)
        return {"error": max(errors)}

    stream, inner = parts[0].element_size(), parts[1].element_size()
    harness.measure(
        benchmark,
        op="add_norm",
        shape=shape,
        provider=provider,
        fn=lambda: function(parts, options),
        check=check,
        work=harness.Work(bytes=parts[0].numel() * 2 * (stream + inner), flops=0),
        enabled="add_norm" if provider == "fast" else None,
    )
