"""Philox 4x32-10, the counter-based generator behind Triton's ``tl.rand``, in torch integers.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A draw is a function of its
key and counter only, so it is the same number on any device, in any batch and in any order.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a*b for 32-bit unsigned a and b held in int64."""
    # int64 wraps modulo 2^64, which keeps all 64 bits; the mask drops the sign bits of the shift.
    product = b * a
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: int | Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """First output word of Philox 4x32-10, equal to that of ``tl.philox(seed, c0, c1, c2, c3)``.

    Args:
        seed: 64-bit key, an int or an int64 tensor of one element.
        c0, c1, c2, c3: int64 tensors that broadcast, each holding a 32-bit unsigned counter word.

    Returns:
        int64 tensor of the broadcast shape, values in [0, 2^32).
    """
    if isinstance(seed, Tensor):
        seed = seed.reshape(())
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0


def gumbel_noise(
    seed: int | Tensor, image_ids: Tensor, step: int | Tensor, vocab_size: int
) -> Tensor:
    """Standard Gumbel noise that depends on (seed, image id, step, code) and on nothing else.

    It is -log(E) with E = -log(1 - u) and u = (word + 1/2) / 2^32. The largest noise decides a
    sample and comes from the smallest E, where u is finest: the tail is not cut at 2^-24.

    Args:
        seed: 64-bit key, as `philox` takes it.
        image_ids: [B] int64.
        step: index of the code being sampled, an int or an integer tensor of one element.
        vocab_size: number of codes V; the code is the low counter word.

    Returns:
        float32 [B, V].
    """
    device = image_ids.device
    code = torch.arange(vocab_size, device=device)
    if isinstance(step, Tensor):
        step = step.to(device, torch.int64).reshape(1, 1)
    else:  # Filled on the device, because a captured graph cannot copy numbers from the host.
        step = torch.full((1, 1), step, dtype=torch.int64, device=device)
    ids = image_ids.to(torch.int64)[:, None]
    word = philox(seed, code[None], step & _LOW, ids & _LOW, (ids >> 32) & _LOW)
    # Above 2^23 float32 cannot represent word + 1/2, but there the half no longer matters.
    uniform = (word.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))
