"""`ops.sample_token` on a CPU: the reference's codes, with noise computed in fewer passes.

It computes guidance, temperature, top-k, top-p and Gumbel-max of logits [B, V] as the reference
does and with the same bits. The reference spends nearly all its time in Philox: ten rounds of
twelve operations on [B, V] int64 temporaries. This implementation differs:

- low words stay unmasked: they only meet an xor whose result is masked (10 operations a round);
- six reused tensors hold all rounds, a few rows at a time, so that nothing is allocated and
  everything stays in the caches;
- the last round computes only the one of four words that is used.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..functional import filter_logits, guided_logits

_LOW = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
# Noise values in one block of rows: its int64 temporaries are 1 MB each. Blocks of 2^15 values are
# too small for torch to split over threads (two cores, 64 rows of 16,384: 35 ms, 2^17 21 ms,
# reference 76 ms).
_BLOCK_VALUES = 2**17
_kept = threading.local()


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


def gumbel_noise(
    seed: int | Tensor, image_ids: Tensor, step: int | Tensor, vocab_size: int
) -> Tensor:
    """The reference's noise of (seed, image id, step, code), float32 [B, V], the same bits."""
    device = image_ids.device
    code = torch.arange(vocab_size, device=device)[None]
    if isinstance(step, Tensor):
        step = step.to(device, torch.int64).reshape(1, 1) & _LOW
    else:  # Filled on the device, because a captured graph cannot copy numbers from the host.
        step = torch.full((1, 1), step & _LOW, dtype=torch.int64, device=device)
    ids = image_ids.to(torch.int64)[:, None]
    noise = torch.empty(ids.shape[0], vocab_size, dtype=torch.float32, device=device)
    rows = max(1, _BLOCK_VALUES // vocab_size)
    for first in range(0, ids.shape[0], rows):
        part = ids[first : first + rows]
        noise[first : first + rows] = _word(seed, code, step, part & _LOW, (part >> 32) & _LOW)
    # The logarithms run over the whole tensor, as in the reference: the same bits with any SIMD.
    noise.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return noise.neg_().log1p_().neg_().log_().neg_()


def _word(seed: int | Tensor, *counters: Tensor) -> Tensor:
    """First word of Philox 4x32-10: int64 of the counters' common shape, valid until the next call.

    c0 and c2 are below 2^32 in every round; c1 and c3 carry garbage above, which the mask drops.
    """
    c0, c1, c2, c3, low0, low1 = _workspace(torch.broadcast_tensors(*counters)[0])
    for full, counter in zip((c0, c1, c2, c3), counters, strict=True):
        full.copy_(counter)
    if isinstance(seed, Tensor):
        seed = seed.reshape(())
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(9):
        torch.mul(c0, _MULTIPLIERS[0], out=low0)
        torch.mul(c2, _MULTIPLIERS[1], out=low1)
        _mix(low1, c1, k0, out=c0)
        _mix(low0, c3, k1, out=c2)
        c1, c3, low0, low1 = low1, low0, c1, c3
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return _mix(torch.mul(c2, _MULTIPLIERS[1], out=low1), c1, k0, out=c0)


def _mix(product: Tensor, other: Tensor, key: int | Tensor, out: Tensor) -> Tensor:
    """High word of ``product`` xor the low word of ``other`` xor ``key``."""
    torch.bitwise_right_shift(product, 32, out=out)
    return out.bitwise_xor_(other).bitwise_xor_(key).bitwise_and_(_LOW)


def _workspace(like: Tensor) -> tuple[Tensor, ...]:
    """Return six int64 tensors that are kept between calls, at most 6 MB per thread.

    Allocating a tensor of this size costs a system call and a page fault for every 4 KB, which
    takes five times as long as the computation in it.
    """
    # A fake tensor of tracing must leave nothing behind.
    if torch.compiler.is_compiling() or type(like) is not Tensor:
        return torch.empty(6, *like.shape, dtype=torch.int64, device=like.device).unbind()
    kept = getattr(_kept, "tensor", None)
    if kept is None or kept.shape[1:] != like.shape or kept.device != like.device:
        # An inference tensor could not be written by a call outside inference mode.
        with torch.inference_mode(False):
            kept = torch.empty(6, *like.shape, dtype=torch.int64, device=like.device)
        _kept.tensor = kept
    return kept.unbind()
