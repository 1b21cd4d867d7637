"""CUDA graphs: capture what a model does repeatedly, and replay it without its launches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from . import switch

# torch allows only one capture at a time. Reentrant, because what warms up may drop other graphs.
_capture = threading.RLock()
# The stream that captures on each device. torch hands out the same 32 streams in turn: if every
# capture took a new one, it would soon be one that another thread uses.
_sides: dict[int, torch.cuda.Stream] = {}


def capture(fn: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Run ``fn`` once to warm up, then capture a second call, which executes nothing.

    Both use a side stream of the current device. Later work on the current stream waits for the
    warm-up.
    """
    here = torch.cuda.current_stream()
    with _capture:
        if here.device_index not in _sides:
            _sides[here.device_index] = torch.cuda.Stream()
        side = _sides[here.device_index]
        side.wait_stream(here)
        with torch.cuda.stream(side):
            fn()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # torch keeps one cuBLAS workspace per stream, and a graph stores its address. The workspace
        # must be in the graph's own memory pool: otherwise the next capture on this stream would
        # find it and free it.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads may continue meanwhile.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                fn()
        finally:
            torch.cuda.set_stream(here)  # torch stays on the side stream if a capture is broken.
            torch._C._cuda_clearCublasWorkspaces()
    return graph


def synchronize(device: torch.device) -> None:
    """Wait for a device, outside any other thread's capture, which the wait would break."""
    with _capture:
        torch.cuda.synchronize(device)


def state_of(model: nn.Module) -> tuple | None:
    """Return a model's modules and their classes, and its tensors' addresses and version counters.

    What is set in place and is no tensor, such as a norm's eps, is not among them.

    None if a module has a hook or a forward pass of its own, which a replay would not call.
    """
    # For a full tokenizer, `modules()` takes more time than everything else here.
    state, left, seen = [], [model], set()
    while left:
        module = left.pop()
        if module in seen or module is None:
            continue
        seen.add(module)
        # A forward pass put on the module itself may change without any weight changing.
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            return None
        state.append((type(module), id(module)))  # A replaced activation has no tensors.
        left += module._modules.values()
        for kind in (module._parameters, module._buffers):
            for tensor in kind.values():
                if tensor is not None:
                    version = 0 if tensor.is_inference() else tensor._version
                    state.append((tensor.data_ptr(), version))
    return tuple(state)


def settings() -> tuple:
    """The process's settings that a captured graph bakes in, because they choose its kernels."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        switch.policy(), switch.generation(), torch.are_deterministic_algorithms_enabled(),
        cuda.matmul.fp32_precision, cudnn.conv.fp32_precision,
        cudnn.enabled, cudnn.deterministic, cudnn.benchmark,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled(),
        cuda.math_sdp_enabled(),
    )  # fmt: skip


class Replayed:
    """A function of a model and one tensor, captured for the most recent shapes.

    The first call with a shape runs normally, the second is captured, and all later ones are
    replayed, on the stream that was current at capture. Every call compares what a capture depends
    on: shape, dtype, stream, `settings`, all weights and the layers' classes. If any of these
    differs, the call runs normally, once. A replay calls no op; `status` counts replays under
    ``name``.
    """

    # The most captured graphs, each with its own buffers, and the most remembered calls, which are
    # captured if they come again.
    MOST, SEEN = 2, 8

    def __init__(self, name: str):
        self.name = name
        self._seen: dict[Hashable, tuple] = {}
        self._recorded: dict[Hashable, tuple[tuple, torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        self._busy = threading.Lock()

    def __call__(self, fn: Callable[[Tensor], Tensor], model: nn.Module, given: Tensor) -> Tensor:
        """Compute ``fn(given)``; ``fn`` must read nothing on the host and need no gradient."""
        # If another thread is in a call, run this one without the graphs.
        if not self._busy.acquire(blocking=False):
            return fn(given)
        try:
            return self._call(fn, model, given)
        finally:
            self._busy.release()

    def _call(self, fn: Callable[[Tensor], Tensor], model: nn.Module, given: Tensor) -> Tensor:
        key = (
            tuple(given.shape), given.dtype, torch.cuda.current_stream(given.device).cuda_stream,
            settings(),
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
        # Inference tensors cannot be written outside inference mode, where the next call may run;
        # and leaving inference mode turns gradients on.
        with torch.cuda.device(given.device), torch.inference_mode(False), torch.no_grad():
            buffer = given.clone()
            graph = capture(lambda: results.append(fn(buffer)))
            graph.replay()
            switch.record.replay(self.name)
            self._recorded[key] = (state, graph, buffer, results[1])
            return results[1].clone()

    def _drop(self, key: Hashable) -> None:
        """Drop a captured graph after waiting for its device: it may still be running."""
        if key in self._recorded:
            synchronize(self._recorded[key][2].device)
            del self._recorded[key]

    def __reduce__(self) -> tuple:
        """A copy of the model starts without captured graphs."""
        return Replayed, (self.name,)
