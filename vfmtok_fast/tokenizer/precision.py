"""The precisions of a tokenizer: the dtype of its weights, and whether products use TF32.

- ``float32``: exact. On a GPU, TF32 is off, which cuDNN's convolutions would otherwise use.
- ``tf32``: float32 weights. On a GPU, products have 10-bit mantissas on the matrix unit, and
  attention runs in float16, which has as many bits. On a CPU this is float32.
- ``float16``, ``bfloat16``: all weights have this dtype.
- ``mixed``: float16 products in the foundation model, which are nearly all of `encode`. Its
  residual stream and norms, and everything after it, are float32, which a GPU treats as in
  ``tf32``.

README.md lists the share of tokens that each leaves unchanged, and docs/exactness.md how many
tokens each part changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

PRECISIONS = ("float32", "tf32", "float16", "bfloat16", "mixed")


def products(vit: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of a plain ViT that multiply matrices."""
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
    """Return one of `PRECISIONS` by the dtypes of the weights, or else those dtypes."""
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
