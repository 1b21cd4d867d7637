"""From images to a vision transformer's embedded patches: normalise, cut and project."""

from __future__ import annotations

from torch import Tensor

from ..reference import patch_embed as reference
from ..switch import Op
from .checks import check_on, check_same, check_shape, check_tensor

# A CPU's convolution leaves nothing to gain.
_op = Op("patch_embed", reference.patch_embed, reference_for="cpu")


def patch_embed(images: Tensor, mean: Tensor, std: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Project each patch of ``((clamp(images) + 1) / 2 - mean) / std``.

    Args:
        images: [B, 3, S, S], clamped to [-1, 1]; S is a multiple of P.
        mean, std: [3], of images in [0, 1].
        weight: [C, 3, P, P], and bias [C], with the same dtype, which the products use.

    Returns:
        [B, (S / P)^2, C], row by row, dtype of ``weight``.

    Raises:
        TypeError: not floating tensors, or weight and bias of two dtypes.
        ValueError: shapes that do not fit, or two devices.

    Source: vision transformers, arXiv 2010.11929, with ImageNet's normalisation.
    """
    name = "patch_embed"
    check_tensor(name, "images", images, "[B, 3, S, S]", 4)
    check_tensor(name, "weight", weight, "[C, 3, P, P]", 4)
    side = weight.shape[-1]
    check_shape(name, "weight", weight, (weight.shape[0], 3, side, side))
    check_shape(name, "images", images, (images.shape[0], 3, images.shape[2], images.shape[2]))
    check_tensor(name, "bias", bias, "[C]", (weight.shape[0],))
    check_same(name, weight=weight, bias=bias)
    for part, value in {"mean": mean, "std": std}.items():
        check_tensor(name, part, value, "[3]", (3,))
    for part, value in {"mean": mean, "std": std, "weight": weight}.items():
        check_on(name, part, value, "images", images)
    if side == 0 or images.shape[2] % side:
        raise ValueError(
            f"{name}: images must be a multiple of the patch's {side} pixels wide, "
            f"got {images.shape[2]}"
        )
    return _op(images, mean, std, weight, bias)
