"""Autoregressive generation, the method `GPT.generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops
from ..ops.checks import check_class_ids, check_integers
from ..ops.sample_token import check_sampling
from .kv_cache import KVCache

if TYPE_CHECKING:
    from .transformer import GPT


@torch.no_grad()
def generate(
    self: GPT,
    class_ids: Tensor,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    image_ids: Tensor | None = None,
    *,
    use_cache: bool = True,
) -> Tensor:
    """Generate the codes of one image per class id.

    The codes of an image are a function of (weights, class id, image id, seed, sampling settings):
    not of the batch, the order or the number of processes, up to logits tied within rounding.
    Dropout is off, whatever mode the model is in.

    Args:
        class_ids: [B] integers in [0, num_classes).
        cfg_scale: classifier-free guidance, ``uncond + cfg_scale * (cond - uncond)``; 1 is none,
            0 is unconditional.
        cfg_interval: n > -1 guides the first code and decode steps 0..n, that is codes 0..n+1, and
            leaves the rest to the conditional logits; -1 guides all.
        temperature: divides the logits (at least 1e-5).
        top_k: keep the k largest logits, and ties; 0 keeps all.
        top_p: then keep the nucleus of this probability; 1 keeps all.
        greedy: take the arg-max instead of sampling.
        seed: in [0, 2^64).
        image_ids: [B] integers that name the images' noise; None is 0..B-1.
        use_cache: False recomputes every position at every step: slow, the oracle of the cache.

    Returns:
        int64 [B, block_size], on the model's device.

    Raises:
        TypeError, ValueError: wrong shape, dtype, device or range.

    Source: LlamaGen (arXiv 2406.06525), autoregressive/models/generate.py.
    """
    config, device = self.config, self.head.weight.device
    check_class_ids("generate", class_ids, config.num_classes)
    check_sampling(
        "generate",
        cfg_scale=cfg_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if isinstance(cfg_interval, bool) or not isinstance(cfg_interval, int) or cfg_interval < -1:
        raise ValueError(f"generate: cfg_interval must be an integer from -1, got {cfg_interval!r}")
    B = class_ids.shape[0]
    if image_ids is None:
        image_ids = torch.arange(B)
    else:
        check_integers("generate", "image_ids", image_ids, (B,))
    class_ids, image_ids = class_ids.long().to(device), image_ids.long().to(device)

    guided = cfg_scale != 1.0
    classes = class_ids
    if guided:  # Rows [conditional; unconditional].
        classes = torch.cat([class_ids, torch.full_like(class_ids, config.num_classes)])
    codes = torch.empty(B, config.block_size, dtype=torch.int64, device=device)
    cache = KVCache(config, len(classes), device, self.head.weight.dtype) if use_cache else None

    trained = [module for module in self.modules() if module.training]
    self.eval()
    try:
        for step in range(config.block_size):
            # Step 0 is the prefill; step s is the release's decode step s - 1.
            if guided and -1 < cfg_interval < step - 1:
                guided = False
                classes = class_ids
                if cache is not None:
                    cache.keep_rows(B)
            repeat = 2 if guided else 1
            if cache is None:
                x = self.embed(classes, codes[:, :step].repeat(repeat, 1))
                logits = self.predict(x)[:, -1]
            elif step == 0:
                logits = self.step(self.class_embedding(classes), cache)
            else:
                logits = self.step(self.token_embedding(codes[:, step - 1].repeat(repeat)), cache)
            codes[:, step] = ops.sample_token(
                logits[:B],
                image_ids,
                step,
                uncond_logits=logits[B:] if guided else None,
                cfg_scale=cfg_scale,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                greedy=greedy,
                seed=seed,
            )
    finally:
        for module in trained:
            module.training = True
    return codes
