"""Generation with everything prepared once: buffers kept, and on a GPU a step is one CUDA graph.

An engine belongs to a model, a number of images, a dtype and a stream. It holds no weights: a step
reads the model's parameters where they are, so that a change in place counts at once, and
parameters that were replaced or moved make a new engine. A model keeps its last engine, and drops
it when it goes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import switch
from ..ops import unchecked
from .kv_cache import KVCache

if TYPE_CHECKING:
    from .generate import Sampling
    from .transformer import GPT

# The ops of a step. While all of them are enabled, `GPT.generate` takes the engine.
STEP_OPS = frozenset(
    [
        *("qkv_rotary", "decode_attention", "linear_residual", "gate_up", "norm_linear"),
        *("sample_token", "append_code"),
    ]
)

_engines: weakref.WeakKeyDictionary[GPT, Engine] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
# Of torch's captures only one may be under way.
_capture = threading.Lock()


def wanted() -> bool:
    """Whether the policy, as it is now, asks for the engine."""
    return switch.policy().ops >= STEP_OPS


def run(
    model: GPT,
    class_ids: Tensor,
    image_ids: Tensor,
    sampling: Sampling,
    tell: Callable[[int], None],
) -> Tensor:
    """Codes int64 [B, block_size] of one batch, as the reference loop of `generate` makes them.

    Args:
        model: its modes do not matter: no op of a step has dropout.
        class_ids, image_ids: int64 [B] on the model's device, checked.
        sampling: checked.
        tell: called with every finished step.
    """
    if model.device.type == "cuda":
        # Streams and captures are the current device's, which may be another one.
        with torch.cuda.device(model.device):
            return _run(model, class_ids, image_ids, sampling, tell)
    return _run(model, class_ids, image_ids, sampling, tell)


def _run(
    model: GPT,
    class_ids: Tensor,
    image_ids: Tensor,
    sampling: Sampling,
    tell: Callable[[int], None],
) -> Tensor:
    key = _key(model, len(class_ids), sampling.guided(0))
    with _lock:
        # Taken out while in use: a second thread makes its own, as does a call from ``tell``.
        engine = _engines.pop(model, None)
    if engine is None or engine.key != key:
        _end(engine)
        del engine  # Its memory first.
        engine = Engine(model, len(class_ids), sampling.guided(0), key)
    try:
        return engine.run(model, class_ids, image_ids, sampling, tell)
    finally:  # Every run begins anew, also after one that was stopped on the way.
        with _lock:
            other = _engines.get(model)  # Of a second thread, or of a call from ``tell``.
            _engines[model] = engine
        _end(other)


def _end(engine: Engine | None) -> None:
    """Let the graphs of an engine that is dropped end: they may still be running."""
    if engine is not None and engine.graphs:
        torch.cuda.synchronize()


def forget() -> None:
    """Drop all engines: their buffers, and graphs that hold what the kernels' settings were."""
    with _lock:
        _engines.clear()


def _key(model: GPT, batch: int, guided: bool) -> tuple:
    """Equal for two calls that may share buffers and graphs: a graph holds these addresses."""
    device = model.device
    addresses = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    # Of another stream's call nobody knows here whether it has ended.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return batch, guided, model.dtype, device, stream, addresses


class Engine:
    """Buffers of ``batch`` images, and the graphs that were captured over them."""

    def __init__(self, model: GPT, batch: int, guided: bool, key: tuple):
        config, device, rows = model.config, model.device, batch * (2 if guided else 1)
        self.key = key
        self.batch = batch
        self.cache = KVCache(config, rows, device, model.dtype)
        self.image_ids = torch.empty(batch, dtype=torch.int64, device=device)
        self.codes = torch.empty(batch, config.block_size, dtype=torch.int64, device=device)
        # The input of the next step.
        self.x = torch.empty(rows, config.dim, dtype=model.dtype, device=device)
        # The position of the next step and the length up to it; a step that reads them adds one.
        self.at = torch.empty(2, dtype=torch.int64, device=device)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}

    def run(
        self,
        model: GPT,
        class_ids: Tensor,
        image_ids: Tensor,
        sampling: Sampling,
        tell: Callable[[int], None],
    ) -> Tensor:
        """See `run` of this module."""
        steps = model.config.block_size
        self.image_ids.copy_(image_ids)
        cache = self.cache
        classes = class_ids
        if guided := sampling.guided(0):
            classes = torch.cat([class_ids, torch.full_like(class_ids, model.config.num_classes)])
        self.x.copy_(model.class_embedding(classes))
        self.advance(model, cache, sampling, guided, 0)
        torch.arange(1, 3, out=self.at)
        tell(0)
        for step in range(1, steps):
            if guided and not sampling.guided(step):
                guided, cache = False, cache.first_rows(self.batch)
            if class_ids.is_cuda:
                self._replay(model, cache, sampling, guided)
            else:
                self.advance(model, cache, sampling, guided, step)
            tell(step)
        return self.codes.clone()

    def advance(
        self, model: GPT, cache: KVCache, sampling: Sampling, guided: bool, at: int | Tensor
    ) -> None:
        """Code ``at`` of all images from the input ``x``, which becomes the next step's.

        With a tensor ``at`` [2], position and length, no value is read on the host, so this can be
        captured; both are advanced.
        """
        x = self.x[: 2 * self.batch if guided else self.batch]
        position, length = at.split(1) if isinstance(at, Tensor) else (at, at + 1)
        logits = model.step(x, cache, position, length)
        code = sampling.draw(logits, self.image_ids, position)
        unchecked.append_code(code, self.codes, at, model.token_embedding.weight, x)

    def _replay(self, model: GPT, cache: KVCache, sampling: Sampling, guided: bool) -> None:
        """One step on a GPU: eagerly the first time, which warms up, then captured and replayed.

        Settings are baked into a graph, and so is what the policy takes; a change captures anew.
        """
        key = (sampling, guided, switch.policy())
        if key in self.graphs:
            self.graphs[key].replay()
            return
        # Graphs of other settings would pile up: two are alive, guided and not.
        self.graphs = {old: graph for old, graph in self.graphs.items() if old[::2] == key[::2]}
        # A stream of this device: torch's own for captures is that of the first device to capture.
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            self.advance(model, cache, sampling, guided, self.at)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Records; runs nothing, so the step above counts once. Other threads may go on meanwhile.
        with _capture, torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            self.advance(model, cache, sampling, guided, self.at)
        self.graphs[key] = graph
