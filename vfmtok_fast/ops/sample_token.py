"""Sampling the next code from logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference import sample_token as reference
from ..switch import Op
from .checks import (
    check_int,
    check_integers,
    check_number,
    check_on,
    check_position,
    check_same,
    check_tensor,
)

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

    Gumbel-max, the arg-max of logits plus Gumbel noise, samples exactly from the softmax
    distribution. The noise is a function of (seed, image id, step, code): Philox 4x32-10 with key
    ``seed`` and counter (code, step, id low, id high), so a row's code does not depend on the
    batch that it is in.

    Args:
        logits: [B, V], conditional logits.
        image_ids: [B] integers, which image each row belongs to.
        step: which code of the image this is, in [0, 2^32): an int, or an integer tensor of one
            element on the logits' device.
        uncond_logits: [B, V]; if given, ``uncond + cfg_scale * (logits - uncond)`` is sampled.
        cfg_scale: guidance scale; 1 is the conditional distribution.
        temperature: divides the logits; values below 1e-5 count as 1e-5.
        top_k: keep the k largest and all ties at the threshold; 0 keeps all.
        top_p: then keep the largest until their total probability first passes this; 1 keeps all.
        greedy: take the arg-max instead; ties go to the lowest code.
        seed: in [0, 2^64), or an int64 tensor of one element on the logits' device that holds these
            64 bits.

    Returns:
        int64 [B].

    Raises:
        TypeError: logits not floating or of two dtypes, or image ids, step, top_k or seed not
            integers.
        ValueError: wrong shapes, two devices, or a setting out of range.

    Source: LlamaGen's sampler (guidance, filters); Gumbel-max after Maddison et al. 2014.
    """
    name = "sample_token"
    check_tensor(name, "logits", logits, "[B, V]", 2)
    if uncond_logits is not None:
        check_tensor(name, "uncond_logits", uncond_logits, "[B, V]", tuple(logits.shape))
        check_same(name, logits=logits, uncond_logits=uncond_logits)
    if logits.shape[1] == 0:
        raise ValueError(f"{name}: logits must have at least one code, got {tuple(logits.shape)}")
    check_integers(name, "image_ids", image_ids, (logits.shape[0],))
    check_on(name, "image_ids", image_ids, "logits", logits)
    check_position(name, "step", step, 0, 2**32, (1,), logits=logits)
    check_position(name, "seed", seed, 0, 2**64, (1,), logits=logits)
    if isinstance(seed, Tensor) and seed.dtype != torch.int64:
        raise TypeError(f"{name}: seed must be torch.int64, got {seed.dtype}")
    check_sampling(name, cfg_scale=cfg_scale, temperature=temperature, top_k=top_k, top_p=top_p)
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
    op: str, *, cfg_scale: float, temperature: float, top_k: int, top_p: float
) -> None:
    """Raise a one-line error for a sampling setting out of range; ``op`` names the caller."""
    for name, value in (("cfg_scale", cfg_scale), ("temperature", temperature), ("top_p", top_p)):
        check_number(op, name, value)
    if not math.isfinite(cfg_scale):
        raise ValueError(f"{op}: cfg_scale must be finite, got {cfg_scale}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"{op}: temperature must be finite and at least 0, got {temperature}")
    check_int(op, "top_k", top_k, 2**31)
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1], got {top_p}")
