"""`ops.patch_embed` against its reference, for DINOv2-L's patches."""

from __future__ import annotations

import harness
import pytest
import torch
from harness import DEVICE, GPU
from torch import Tensor

from vfmtok_fast import ops, tf32
from vfmtok_fast.reference.patch_embed import patch_embed as reference

B, SIDE, P, C = 64 if GPU else 4, 336, 14, 1024
PROVIDERS = harness.providers(lambda *tensors: ops.patch_embed(*tensors))


def inputs(dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator(DEVICE).manual_seed(0)
    images, weight, bias = (
        torch.randn(shape, generator=draw, device=DEVICE)
        for shape in ((B, 3, SIDE, SIDE), (C, 3, P, P), (C,))
    )
    mean = torch.tensor([0.485, 0.456, 0.406], device=DEVICE)
    return [images / 2, mean, mean / 2, (weight / P / 2).to(dtype), bias.to(dtype)]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@torch.no_grad()
def bench_patch_embed(benchmark, dtype: torch.dtype, provider: str):
    tensors = inputs(dtype)
    function = PROVIDERS[provider]()

    def check(got: Tensor) -> dict[str, object]:
        exact = reference(tensors[0][:1].double(), *(part.double() for part in tensors[1:]))
        ruler = reference(tensors[0][:1], *tensors[1:])
        error, own = (float((y[:1] - exact).abs().max()) for y in (got, ruler))
        assert error <= 2 * own + torch.finfo(dtype).eps * float(exact.abs().max())
        return {"error": error}

    patches = B * (SIDE // P) ** 2
    with tf32.computing(tensors[0].device, False):  # By default, torch allows it in convolutions.
        harness.measure(
            benchmark,
            op="patch_embed",
            shape=f"B={B} {'bf16' if dtype == torch.bfloat16 else 'fp32'}",
            provider=provider,
            fn=lambda: function(*tensors),
            check=check,
            work=harness.Work(
                bytes=tensors[0].nbytes + patches * C * tensors[4].element_size(),
                flops=2 * patches * 3 * P * P * C,
            ),
            enabled="patch_embed" if provider == "fast" else None,
        )
