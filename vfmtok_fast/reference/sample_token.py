"""Reference of `ops.sample_token`: guidance, temperature, top-k, top-p, Gumbel-max."""

from __future__ import annotations

from torch import Tensor

from ..functional import filter_logits, guided_logits
from .philox import gumbel_noise


def sample_token(
    logits: Tensor, image_ids: Tensor, step: int | Tensor, *, uncond_logits: Tensor | None = None,
    cfg_scale: float = 1.0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
    greedy: bool = False, seed: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """See `vfmtok_fast.ops.sample_token`."""
    logits = guided_logits(logits, uncond_logits, cfg_scale)
    if greedy:
        return logits.argmax(dim=-1)
    logits = filter_logits(logits / max(temperature, 1e-5), top_k, top_p)
    return (logits + gumbel_noise(seed, image_ids, step, logits.shape[-1])).argmax(dim=-1)
