"""Triton `ops.append_code`: the codes, their embeddings and the step's counters in one launch.

codes[b, position] = code[b]; x[r, :] = embedding[code[r % B], :]; position += 1. Bytes: 2 rows of
x and of the embedding for each image, 8 KB for GPT-L guided: nothing but a launch. As operations
of torch it is five, which cannot overlap with the kernels around them.

The first program writes the codes and, alone, reads and advances the position; the others have a
row of x each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import _let_next_begin, _wait_for_last, on, overlap

# Codes that the first program writes at a time.
CODES = 128


@triton.jit(do_not_specialize=["B", "T", "number"])
def _append_code(
    code, codes, position, number, embedding, x, B, T,
    COUNTERS: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, CODES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """COUNTERS: elements of ``position``, or 0 where that is None and ``number`` the position."""
    if OVERLAP:
        _wait_for_last()
        _let_next_begin()
    row = tl.program_id(0).to(tl.int64) - 1
    if row < 0:
        at = number.to(tl.int64)
        if COUNTERS > 0:
            at = tl.load(position)
            last = tl.load(position + COUNTERS - 1)
        for first in range(0, B, CODES):
            o_b = first + tl.arange(0, CODES)
            m_b = (o_b < B) & (at >= 0) & (at < T)
            value = tl.load(code + o_b, mask=m_b, other=0)
            tl.store(codes + o_b.to(tl.int64) * T + at, value, mask=m_b)
        if COUNTERS > 0:
            # Every thread has read it for itself; none may find it advanced.
            tl.debug_barrier()
            tl.store(position, at + 1)
            if COUNTERS > 1:
                tl.store(position + 1, last + 1)
    else:
        o_c = tl.arange(0, WIDTH)
        m_c = o_c < C
        which = tl.load(code + row % B)
        value = tl.load(embedding + which * C + o_c, mask=m_c)
        tl.store(x + row * C + o_c, value, mask=m_c)


def unsupported_reason(
    code: Tensor, codes: Tensor, position: int | Tensor, embedding: Tensor, x: Tensor
) -> str | None:
    """Why this cannot take the call, or None."""
    if torch.is_grad_enabled() and embedding.requires_grad:
        return "it has no backward pass (wrap the call in torch.no_grad())"
    if not all(t.is_contiguous() for t in (code, codes, embedding, x)):
        return "it takes contiguous tensors"
    if isinstance(position, Tensor) and not position.is_contiguous():
        return "it takes a contiguous position"
    if embedding.shape[1] > 2**15:
        return f"it takes embeddings of up to 32768 values, not {embedding.shape[1]}"
    return None


def append_code(
    code: Tensor, codes: Tensor, position: int | Tensor, embedding: Tensor, x: Tensor
) -> None:
    """See `vfmtok_fast.ops.append_code`; takes what `unsupported_reason` lets pass."""
    at, number = (position, 0) if isinstance(position, Tensor) else (None, position)
    torch.ops.vfmtok_fast.append_code_triton(code, codes, at, number, embedding, x)


def _launch(
    code: Tensor, codes: Tensor, at: Tensor | None, number: int, embedding: Tensor, x: Tensor
) -> None:
    (B, T), C = codes.shape, embedding.shape[1]
    if B == 0 and at is None:
        return
    with on(x.device):
        _append_code[(1 + x.shape[0],)](
            code, codes, at, number, embedding, x, B, T,
            COUNTERS=0 if at is None else at.numel(), C=C, WIDTH=triton.next_power_of_2(max(C, 1)),
            CODES=CODES, **overlap(x.device), num_warps=4,
        )  # fmt: skip


def _fake(code: Tensor, codes: Tensor, at, number, embedding: Tensor, x: Tensor) -> None:
    return None


_library = torch.library.Library("vfmtok_fast", "FRAGMENT")
_library.define(
    "append_code_triton(Tensor code, Tensor(a!) codes, Tensor(b!)? at, SymInt number, "
    "Tensor embedding, Tensor(c!) x) -> ()"
)
_library.impl("append_code_triton", _launch, "CompositeExplicitAutograd")
torch.library.register_fake("vfmtok_fast::append_code_triton", _fake, lib=_library)
