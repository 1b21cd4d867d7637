"""CUDA graphs: what a model does again and again is recorded once, and costs no launches then."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from . import switch

# Of torch's captures only one may be under way.
_capture = threading.Lock()


def capture(fn: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Run ``fn`` once, which warms up, and record it once more, which runs nothing.

    Both on a stream of the current device; what comes next in the current stream waits for it.
    """
    # Torch's own stream for captures is that of the first device to capture.
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        fn()
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with _capture:
        # torch keeps cuBLAS's workspace of a stream, and a graph has its address: it is to lie in
        # the graph's own memory, not where the next capture on this stream would find and free it.
        torch._C._cuda_clearCublasWorkspaces()
        # Other threads may go on meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            fn()
        torch._C._cuda_clearCublasWorkspaces()
    return graph


def synchronize(device: torch.device) -> None:
    """Wait for a device, which would break the capture that another thread is in."""
    with _capture:
        torch.cuda.synchronize(device)


def state_of(model: nn.Module) -> tuple | None:
    """Where a model's tensors are and how often they were changed in place; None with hooks.

    A replay would call no hook.
    """
    # Of a full tokenizer `modules()` takes more time than all that is asked here.
    state, left, seen = [], [model], set()
    while left:
        module = left.pop()
        if module in seen or module is None:
            continue
        seen.add(module)
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        left += module._modules.values()
        for kind in (module._parameters, module._buffers):
            for tensor in kind.values():
                if tensor is not None:
                    version = 0 if tensor.is_inference() else tensor._version
                    state.append((tensor.data_ptr(), version))
    return tuple(state)


class Replayed:
    """A model's function of one tensor, recorded for the shapes that it is called with last.

    The first call with a shape runs as it is, the second is recorded, all others are replayed, on
    the stream that the recording belongs to. What a recording depends on is compared at every call:
    shape, dtype, stream, the policy of `switch`, torch's settings and all weights; where anything
    is another the call runs as it is, once. A replay calls no op; `status` counts replays by
    ``name``.
    """

    # Recordings, each of which has buffers of its own; and calls that may come to be recorded.
    MOST, SEEN = 2, 8

    def __init__(self, name: str):
        self.name = name
        self._seen: dict[Hashable, tuple] = {}
        self._recorded: dict[Hashable, tuple[tuple, torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._busy = threading.Lock()

    def __call__(self, fn: Callable[[Tensor], Tensor], model: nn.Module, given: Tensor) -> Tensor:
        """``fn(given)``, of which nothing is read on the host and no gradient is asked for."""
        # A second thread's call runs beside the first one's.
        if not self._busy.acquire(blocking=False):
            return fn(given)
        try:
            return self._call(fn, model, given)
        finally:
            self._busy.release()

    def _call(self, fn: Callable[[Tensor], Tensor], model: nn.Module, given: Tensor) -> Tensor:
        key = (
            tuple(given.shape), given.dtype, torch.cuda.current_stream(given.device).cuda_stream,
            switch.policy(), switch.generation(), torch.are_deterministic_algorithms_enabled(),
            torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision,
        )  # fmt: skip
        state = state_of(model)
        if state is None:
            return fn(given)
        if key in self._recorded and self._recorded[key][0] == state:
            _, graph, buffer, result = self._recorded[key]
            with torch.cuda.device(given.device):
                buffer.copy_(given)
                graph.replay()
                switch.record.replay(self.name)
                return result.clone()
        self._drop(key)
        if self._seen.pop(key, None) != state:
            self._seen[key] = state
            if len(self._seen) > self.SEEN:
                del self._seen[next(iter(self._seen))]
            return fn(given)
        if len(self._recorded) >= self.MOST:
            self._drop(next(iter(self._recorded)))
        results: list[Tensor] = []
        # Tensors of inference mode cannot be written to outside of it, where the next call may be;
        # and to leave it turns gradients on.
        with torch.cuda.device(given.device), torch.inference_mode(False), torch.no_grad():
            buffer = given.clone()
            graph = capture(lambda: results.append(fn(buffer)))
            graph.replay()
            switch.record.replay(self.name)
            self._recorded[key] = (state, graph, buffer, results[1])
            return results[1].clone()

    def _drop(self, key: Hashable) -> None:
        """Give up a recording, after it has ended: it may still be running."""
        if key in self._recorded:
            synchronize(self._recorded[key][2].device)
            del self._recorded[key]

    def __reduce__(self) -> tuple:
        """A copy of the model has recorded nothing yet."""
        return Replayed, (self.name,)
