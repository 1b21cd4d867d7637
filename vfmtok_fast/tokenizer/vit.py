"""A plain vision transformer from timm, read at several depths through `ops`.

The weights stay in the modules that timm made. The residual stream has the dtype of the position
table, and each product has the dtype of its weights. The dtypes of the weights alone thus give a
float32 stream around half-precision products.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

from torch import Tensor, nn

from .. import ops
from ..functional import is_unhooked
from .attention import attend


@functools.cache
def _timm() -> SimpleNamespace:
    """timm's classes by name; some have moved from the model's file to the layers."""
    # timm imports torchvision, which imports Triton; importing the package must not do that.
    from timm import layers
    from timm.models import vision_transformer

    return SimpleNamespace(**vars(layers) | vars(vision_transformer))


def is_plain(vit: nn.Module) -> bool:
    """Whether `read` computes what ``vit`` does: pre-norm blocks of attention and a GELU MLP.

    The check compares exact classes, because a subclass may do anything. Rotary positions, SwiGLU,
    parallel or post-norm blocks, and norms inside the attention or the MLP are not plain. Neither
    are modules with hooks, which `read` would not call.
    """
    left = [vit]
    while left:  # Runs at every call; `modules()` would take as long as all the rest.
        part = left.pop()
        if not is_unhooked(part):
            return False
        left += (inner for inner in part._modules.values() if inner is not None)
    if type(vit) is not _timm().VisionTransformer or not _is_norm(vit.norm):
        return False
    return all(_is_plain_block(block) for block in vit.blocks)


def cuts_plainly(patches: nn.Module) -> bool:
    """Whether a ViT's ``patch_embed`` is what `ops.patch_embed` computes after normalisation."""
    if type(patches) is not _timm().PatchEmbed or type(patches.proj) is not nn.Conv2d:
        return False
    projection, side = patches.proj, tuple(patches.patch_size)
    return (
        side[0] == side[1]
        and projection.kernel_size == projection.stride == side
        and projection.padding == (0, 0)
        and projection.in_channels == 3
        and projection.bias is not None
        and patches.flatten
        and not patches.dynamic_img_pad
        and type(patches.norm) is nn.Identity
    )


# torch.compile cannot inspect a ViT: it asks once, when it compiles, and keeps the answer. This is
# what torch.compiler.assume_constant_result does; calling it would import Triton.
is_plain._dynamo_marked_constant = cuts_plainly._dynamo_marked_constant = True


def _is_norm(module: nn.Module) -> bool:
    if type(module) not in (nn.LayerNorm, _timm().LayerNorm):
        return False
    faster = getattr(module, "_fast_norm", False)
    return not faster and module.weight is not None and module.bias is not None


def _is_plain_block(block: nn.Module) -> bool:
    timm = _timm()
    if type(block) is not timm.Block:
        return False
    attention, mlp = block.attn, block.mlp
    if type(attention) is not timm.Attention or type(mlp) is not timm.Mlp:
        return False
    # Older timm versions have neither of these in their attention.
    extras = (getattr(attention, name, None) for name in ("norm", "gate"))
    products = (attention.qkv, attention.proj, mlp.fc1, mlp.fc2)
    return (
        attention.fused_attn
        and all(type(extra) in (type(None), nn.Identity) for extra in extras)
        and all(type(product) is nn.Linear for product in products)
        and all(type(scale) in (nn.Identity, timm.LayerScale) for scale in (block.ls1, block.ls2))
        and type(mlp.norm) is nn.Identity
        and type(mlp.act) is nn.GELU
        and mlp.act.approximate == "none"
        and _is_norm(block.norm1)
        and _is_norm(block.norm2)
    )


def read(vit: nn.Module, patches: Tensor, levels: tuple[int, ...]) -> list[Tensor]:
    """Turn embedded patches [B, patches, C] into one map of the same shape per level.

    ``levels`` are rising block indices. The output of the last block passes through the final norm.
    ``vit`` must be plain and in eval mode.
    """
    x = vit.norm_pre(vit.patch_drop(vit._pos_embed(patches)))
    following = [*(block.norm1 for block in vit.blocks[1:]), vit.norm]
    normed = vit.blocks[0].norm1(x)
    maps = []
    for i, (block, norm) in enumerate(zip(vit.blocks[: levels[-1] + 1], following, strict=False)):
        attention, mlp = block.attn, block.mlp
        branch = _attend(attention, normed)
        x, normed = _add_norm(x, branch, block.ls1, block.norm2, mlp.fc1)
        branch = _product(mlp.fc2, _product(mlp.fc1, normed, "gelu"))
        x, normed = _add_norm(
            x, branch, block.ls2, norm, None if norm is vit.norm else attention.qkv
        )
        if i in levels:
            maps.append((normed if norm is vit.norm else x)[:, vit.num_prefix_tokens :])
    return maps


def _product(layer: nn.Linear, x: Tensor, activation: str | None = None) -> Tensor:
    x = x.to(layer.weight.dtype)
    return ops.linear(x, layer.weight, layer.bias, activation=activation)


def _add_norm(
    x: Tensor, branch: Tensor, scale: nn.Module, norm: nn.LayerNorm, reader: nn.Linear | None
) -> tuple[Tensor, Tensor]:
    """Return the stream plus a branch, and that sum normalised for the layer that reads it."""
    return ops.add_norm(
        x, branch, norm.weight, norm.bias, scale=getattr(scale, "gamma", None), eps=norm.eps,
        dtype=None if reader is None else reader.weight.dtype,
    )  # fmt: skip


def _attend(attention: nn.Module, x: Tensor) -> Tensor:
    qkv = _product(attention.qkv, x).unflatten(-1, (3, attention.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attention.q_norm(q), attention.k_norm(k)
    return _product(attention.proj, attend(q, k, v).transpose(1, 2).flatten(2))
