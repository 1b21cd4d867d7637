"""Nearest codebook entry."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import nearest_code as reference
from ..switch import Op
from .checks import check_same, check_tensor

_op = Op("nearest_code", reference.nearest_code)


# What the kernels keep per row grows with k.
MAX_K = 8


def nearest_code(
    z: Tensor,
    codebook: Tensor,
    *,
    k: int = 1,
    normalize: bool = True,
    return_score: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Find the ``k`` codebook rows nearest to each row of ``z``, the lowest index on ties.

    Discrete, so without a gradient: inputs are detached.

    Args:
        z: queries, [N, d], float32, float16, bfloat16 or float64; N may be 0.
        codebook: [K, d], K >= 1, d >= 1, dtype and device of ``z``.
        k: how many, from 1 to 8 and at most K.
        normalize: compare directions (VFMTok does): both sides are scaled to length one, and the
            nearest row is the one with the largest dot product. False compares as they are.
        return_score: also return the score of the chosen row.

    Returns:
        int64 [N], for k > 1 [N, k] in descending order of score, equal scores in order of index;
        with ``return_score`` also their scores in that shape, float32 (float64 for float64 input):
        the cosine, or without ``normalize`` ``z.e - |e|^2 / 2``, which orders as the distance does.

        With ``normalize`` a row of zeros has the score 0 with every code: codes 0 to k - 1. A row
        that holds NaN or infinity gets codes 0 to k - 1 and the score NaN.
        A codebook row that is not finite is no codebook: every finite query gets the first such
        row, then the lowest others, all with the score NaN.

    Raises:
        TypeError: not a floating tensor, two dtypes, or k not an int.
        ValueError: wrong shapes, two devices, an empty codebook, k out of range.

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
    # Asking torch whether a device has autocast breaks the graph of torch.compile (torch 2.11).
    if z.device.type != "meta":
        # The search keeps the precision of its input; autocast would score in half precision.
        with torch.autocast(z.device.type, enabled=False):
            return _op(z, codebook, k=k, normalize=normalize, return_score=return_score)
    return _op(z, codebook, k=k, normalize=normalize, return_score=return_score)
