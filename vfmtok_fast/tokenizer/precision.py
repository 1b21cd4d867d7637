"""In which precision a tokenizer computes: what its weights are held in, and TF32 or not.

- ``float32``: exact; on a GPU without TF32, which cuDNN's convolutions would else take.
- ``tf32``: float32 weights, products of 10-bit mantissas on a GPU's matrix unit, attention in
  float16, which has as many bits; on a CPU float32.
- ``float16``, ``bfloat16``: all weights.
- ``mixed``: float16 products in the foundation model, which are nearly all of `encode`; its
  residual stream and norms, and all that follows, are float32, on a GPU as in ``tf32``.

README.md has the share of tokens that each leaves as they are, docs/exactness.md which part costs
how many.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

PRECISIONS = ("float32", "tf32", "float16", "bfloat16", "mixed")


def products(vit: nn.Module) -> Iterator[nn.Module]:
    """The layers of a plain ViT that multiply matrices."""
    yield vit.patch_embed.proj
    for block in vit.blocks:
        yield from (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)


def set_precision(model: nn.Module, precision: str) -> None:
    """Cast ``model``, a `VFMTok`, to one of `PRECISIONS`; see `VFMTok.set_precision`."""
    if precision not in PRECISIONS:
        raise ValueError(
            f"set_precision: must be one of {', '.join(PRECISIONS)}, got {precision!r}"
        )
    has = precision_of(model)
    if precision == has:
        return
    if has not in ("float32", "tf32", "float64"):
        raise ValueError(
            f"set_precision: the weights were rounded to {has}; load the model again for "
            f"{precision}"
        )
    if precision == "mixed" and not model.backbone.is_plain:
        raise ValueError(
            f"set_precision: mixed needs a plain ViT, which {model.config.backbone.timm_name} is "
            "not; choose float32, tf32, float16 or bfloat16"
        )
    half = precision in ("float16", "bfloat16")
    model.to(getattr(torch, precision) if half else torch.float32)
    if precision == "mixed":
        for layer in products(model.backbone.vit):
            layer.half()
    model.tf32 = precision in ("tf32", "mixed")


def precision_of(model: nn.Module) -> str:
    """One of `PRECISIONS`, by what the weights are held in; or another dtype, or several."""
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()})
    if dtypes == ["float32"]:
        return "tf32" if model.tf32 else "float32"
    if len(dtypes) == 1:
        return dtypes[0]
    if dtypes == ["float16", "float32"] and model.backbone.is_plain:
        inside = {id(w) for layer in products(model.backbone.vit) for w in layer.parameters()}
        narrow = {id(w) for w in model.parameters() if w.dtype == torch.float16}
        if inside == narrow:
            return "mixed"
    return " and ".join(dtypes)
