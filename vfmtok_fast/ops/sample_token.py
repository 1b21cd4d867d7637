"""Drawing the next code from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference import sample_token as reference
from ..switch import Op
from .checks import INTEGER, check_int, check_integers, check_number, check_same, check_tensor

_op = Op("sample_token", reference.sample_token)


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
    seed: int | Tensor = 0,
) -> Tensor:
    """Draw one code per row: guidance, temperature, top-k, top-p, then Gumbel-max.

    Gumbel-max, the arg-max of logits plus Gumbel noise, follows exactly the law of softmax
    sampling. The noise is a function of (seed, image id, step, code): Philox 4x32-10 with key
    ``seed`` and counter (code, step, id low, id high), so a row's code does not depend on the
    batch it is in.

    Args:
        logits: [B, V], conditional logits.
        image_ids: [B] integers, which image each row belongs to.
        step: which code of the image this is; an int or an integer tensor of one element that
            holds a number in [0, 2^32).
        uncond_logits: [B, V]; if given, ``uncond + cfg_scale * (logits - uncond)`` is sampled.
        cfg_scale: guidance scale; 1 is the conditional law.
        temperature: divides the logits, at least 1e-5.
        top_k: keep the k largest and all ties at the threshold; 0 keeps all.
        top_p: then keep the largest that together first pass this probability; 1 keeps all.
        greedy: take the arg-max instead, the lowest code on ties.
        seed: in [0, 2^64); or an int64 tensor of one element that holds these 64 bits, on the
            logits' device.

    Returns:
        int64 [B].

    Raises:
        TypeError: logits not floating or of two dtypes, or image ids, top_k or seed no integers.
        ValueError: shapes, or a setting outside its range.

    Source: LlamaGen's sampler (guidance, filters); Gumbel-max after Maddison et al. 2014.
    """
    name = "sample_token"
    check_tensor(name, "logits", logits, "[B, V]", 2)
    if uncond_logits is not None:
        check_tensor(name, "uncond_logits", uncond_logits, "[B, V]", 2)
        check_same(name, logits=logits, uncond_logits=uncond_logits)
        if uncond_logits.shape != logits.shape:
            raise ValueError(
                f"{name}: uncond_logits must have shape {tuple(logits.shape)}, "
                f"got {tuple(uncond_logits.shape)}"
            )
    if logits.shape[1] == 0:
        raise ValueError(f"{name}: logits must have at least one code, got {tuple(logits.shape)}")
    check_integers(name, "image_ids", image_ids, (logits.shape[0],))
    if image_ids.device != logits.device:
        raise ValueError(
            f"{name}: image_ids must be on {logits.device}, as logits is, got {image_ids.device}"
        )
    if not isinstance(step, Tensor):
        check_int(name, "step", step, 2**32)
    elif step.dtype not in INTEGER or step.numel() != 1:
        raise ValueError(
            f"{name}: step must be an int or an integer tensor of one element, "
            f"got {step.dtype} {tuple(step.shape)}"
        )
    known = seed
    if isinstance(seed, Tensor):
        known = 0  # Its value would have to be waited for, and all are right.
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != logits.device:
            raise ValueError(
                f"{name}: seed must be an int or an int64 tensor of one element on "
                f"{logits.device}, got {seed.dtype} {tuple(seed.shape)} on {seed.device}"
            )
    check_sampling(
        name, cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p, seed=known
    )
    return _op(
        logits,
        image_ids,
        step,
        uncond_logits=uncond_logits,
        cfg_scale=cfg_scale,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        greedy=greedy,
        seed=seed,
    )


def check_sampling(
    op: str, *, cfg_scale: float, temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    """Raise one line for a sampling setting outside its range; ``op`` names the caller."""
    for name, value in (("cfg_scale", cfg_scale), ("temperature", temperature), ("top_p", top_p)):
        check_number(op, name, value)
    if not math.isfinite(cfg_scale):
        raise ValueError(f"{op}: cfg_scale must be finite, got {cfg_scale}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"{op}: temperature must be finite and at least 0, got {temperature}")
    check_int(op, "top_k", top_k, 2**31)
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1], got {top_p}")
    check_int(op, "seed", seed, 2**64)
