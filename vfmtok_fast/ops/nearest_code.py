"""Nearest codebook entry."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import nearest_code as reference
from ..switch import Op
from .checks import check_same, check_tensor

_op = Op("nearest_code", reference.nearest_code)


# The state that the kernels keep per row grows with k.
MAX_K = 8


def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    k: int = 1,
    normalize: bool = True,
    return_score: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Find the ``k`` codebook rows nearest to each row of ``z``; ties go to the lowest index.

    The result is discrete and has no gradient: inputs are detached.

    Args:
        z: queries, [N, d], float32, float16, bfloat16 or float64; N may be 0.
        codebook: [K, d], K >= 1, d >= 1, dtype and device of ``z``.
        k: number of codes per row, from 1 to 8 and at most K.
        normalize: compare directions, as VFMTok does: both sides are scaled to unit length, and the
            nearest row is the one with the largest dot product. False compares them unscaled.
        return_score: also return the scores of the chosen rows.

    Returns:
        int64 [N], or [N, k] for k > 1, in descending order of score, equal scores in order of
        index. With ``return_score`` also the scores in that shape, float32 (float64 for float64
        input): the cosine, or without ``normalize`` ``z.e - |e|^2 / 2``, which orders codes by
        distance.

        With ``normalize``, a row of zeros scores 0 with every code and gets codes 0 to k - 1. A row
        that holds NaN or infinity gets codes 0 to k - 1 and the score NaN.
        If a codebook row is not finite, every finite query gets the first such row, then the lowest
        others, all with the score NaN.

    Raises:
        TypeError: not a floating tensor, two dtypes, or k not an int.
        ValueError: wrong shapes, two devices, an empty codebook, or k out of range.

    Source: VFMTok (arXiv 2507.08441) section 3.2, the L2-normalised lookup of LlamaGen's quantiser.
    """
    check_tensor("nearest_code", "codebook", codebook, "[K, d]", 2)
    check_tensor("nearest_code", "z", z, f"[N, {codebook.shape[1]}]", 2)
    check_same("nearest_code", z=z, codebook=codebook)
    if codebook.numel() == 0:
        raise ValueError(
            f"nearest_code: codebook must have at least one row and column, "
            f"got shape {tuple(codebook.shape)}"
        )
    if z.shape[1] != codebook.shape[1]:
        raise ValueError(
            f"nearest_code: z must have shape [N, {codebook.shape[1]}], got {tuple(z.shape)}"
        )
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"nearest_code: k must be an int, got {k!r}")
    if not 1 <= k <= min(MAX_K, codebook.shape[0]):
        raise ValueError(
            f"nearest_code: k must be 1 to {MAX_K} and at most K = {codebook.shape[0]}, got {k}"
        )
    z, codebook = z.detach(), codebook.detach()
    # Asking torch whether a device has autocast is a graph break in torch.compile (torch 2.11).
    if z.device.type != "meta":
        # The search keeps its input's precision; autocast would compute scores in half precision.
        with torch.autocast(z.device.type, enabled=False):
            return _op(z, codebook, k=k, normalize=normalize, return_score=return_score)
    return _op(z, codebook, k=k, normalize=normalize, return_score=return_score)
