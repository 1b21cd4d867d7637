"""Whether a library's attention works here, found out by calling it once for each kind of call.

An installed package that can be imported may still not work: its kernels may have been built for
another torch, for other GPUs, or not at all. The package reports this only when its kernels are
called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

# Device, dtype, head dim, and whether queries share heads: the libraries choose kernels by these.
Kind = tuple[torch.device, torch.dtype, int, bool]
# What packages raise if they were built for something else, or if their interface has changed.
ERRORS = (
    *(ImportError, OSError, RuntimeError, NameError),
    *(AttributeError, TypeError, ValueError, AssertionError),
)


class Trial:
    """What is known about ``attend``, a provider's `decode_attention`, for each kind of call."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, int], Tensor]):
        self.attend = attend
        self._found: dict[Kind, str | None] = {}

    def reason(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scales: Mapping[str, Tensor | None]
    ) -> str | None:
        """Why a call like this one cannot work, or None.

        The checks are what both libraries require, and then what the first call of its kind showed.
        """
        if scales:
            return "it takes no caches of 8 bits"
        if q.dtype not in (torch.float16, torch.bfloat16):
            return f"it takes float16 and bfloat16, not {q.dtype}"
        # flash-attn pads other dims itself, copying both caches in every call.
        if q.shape[2] % 8 or not 8 <= q.shape[2] <= 256:
            return f"it takes heads of dimension 8 to 256, multiples of 8, not {q.shape[2]}"
        if q.shape[0] == 0:
            return "it takes at least one row"
        if k_cache.stride(3) != 1 or v_cache.stride(3) != 1:
            return "it takes caches whose last stride is 1"
        if torch.compiler.is_compiling():
            return "torch.compile cannot trace it"
        if torch.cuda.get_device_capability(q.device) < (8, 0):
            return "it needs a GPU of compute capability 8.0 or later"
        if type(q) not in (Tensor, torch.nn.Parameter):
            return f"it takes plain tensors, not {type(q).__name__}"
        kind = (q.device, q.dtype, q.shape[2], q.shape[1] != k_cache.shape[1])
        untried = kind not in self._found
        if untried and q.is_cuda and torch.cuda.is_current_stream_capturing():
            return "it was not tried before this capture (make one such call ahead of it)"
        return self._look(kind)

    def reason_on(self, device: str) -> str | None:
        """Why it cannot work on ``device``, or None; tried with heads of 64, like GPT-L's."""
        index = None
        if device == "cuda":
            if not torch.cuda.is_available():
                return None
            index = torch.cuda.current_device()
        return self._look((torch.device(device, index), torch.float16, 64, False))

    def failures(self) -> tuple[str, ...]:
        """What was found not to work, for `vfmtok_fast.status()`; runs no trial."""
        return tuple(dict.fromkeys(reason for reason in self._found.values() if reason))

    def _look(self, kind: Kind) -> str | None:
        if kind not in self._found:
            self._found[kind] = self._try(kind)
        return self._found[kind]

    def _try(self, kind: Kind) -> str | None:
        """Attend to one live position: the answer must be its value, bit for bit."""
        device, dtype, D, shared = kind
        G = 1 if shared else 2
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            keys = torch.ones(1, G, 2, D, dtype=dtype, device=device)
            values = torch.arange(G * 2 * D, device=device).view(1, G, 2, D).remainder(13).to(dtype)
            want = values[:, :, 0].expand(1, 2, D)
            try:
                right = torch.equal(self.attend(keys.new_ones(1, 2, D), keys, values, 1), want)
            except torch.OutOfMemoryError:
                raise  # This says nothing about the library.
            except ERRORS as error:
                return f"it was tried on {device} and failed ({one_line(error)})"
        return None if right else f"it was tried on {device} and gave a wrong result"


def one_line(error: Exception) -> str:
    """Type, first and last line of an error: what failed, and in long errors the last cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ... ".join(dict.fromkeys([*lines[:1], *lines[-1:]]))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
