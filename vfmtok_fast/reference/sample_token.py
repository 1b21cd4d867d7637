"""Reference of `ops.sample_token`: guidance, temperature, top-k, top-p, Gumbel-max."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import gumbel_noise


def sample_token(
    logits: Tensor,
    image_ids: Tensor,
    step: int | Tensor,
    *,
    uncond_logits: Tensor | None = None,
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
) -> Tensor:
    """See `vfmtok_fast.ops.sample_token`."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(dtype)
    if uncond_logits is not None:
        uncond_logits = uncond_logits.to(dtype)
        logits = uncond_logits + cfg_scale * (logits - uncond_logits)
    if greedy:
        return logits.argmax(dim=-1)
    logits = filter_logits(logits / max(temperature, 1e-5), top_k, top_p)
    return (logits + gumbel_noise(seed, image_ids, step, logits.shape[-1])).argmax(dim=-1)


def filter_logits(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set logits [B, V] outside the ``top_k`` largest, then outside the ``top_p`` nucleus, to -inf.

    Ties at the top-k threshold are all kept. The nucleus ends with the first code that takes the
    cumulative probability past ``top_p``; among equal logits the lower code counts first.
    """
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probability = ordered.softmax(dim=-1)
        # The mass before a code decides, so that the code which crosses top_p is kept.
        before = probability.cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0] = 0
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before > top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits
