"""The generation loop of a model: buffers, KV cache and CUDA graphs for a fixed number of images.

`Decoder` has the only loop over positions. A step is `ops.decode_step`, a draw and two small
copies. On a GPU with these ops enabled, the step is captured once and replayed. `GPT.generate` and
`GPT.stream` keep the last decoder of their model, see `Kept`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops, switch, tf32
from ..checks import check_class_ids
from ..decoding import KVCache, StepWeights
from ..graphs import capture, settings, synchronize
from ..ops.checks import check_int, check_integers
from .memory import told_if_out_of_memory
from .sampling import Sampling

if TYPE_CHECKING:
    from .transformer import GPT

# Called with (codes done, codes in all) after every position of a batch; may raise to stop.
Progress = Callable[[int, int], None]
# While all of these are enabled, a step on a GPU is captured and replayed.
STEP_OPS = frozenset(["decode_step", "decode_attention", "sample_token"])


class Decoder:
    """Generates up to ``batch`` images at a time; make one with `GPT.decoder`.

    A decoder owns its buffers, which are freed with it, but no weights: a step reads the model's
    parameters in place, so an in-place change takes effect at once. It runs one call at a time; on
    a GPU, on the stream that was current when it was made.

    Args:
        model: a `GPT`, which must outlive the decoder.
        batch: images at a time.
        guided: whether classifier-free guidance can be used, which takes twice the memory.
        kv_dtype: dtype of keys and values. None is the model's. ``torch.int8`` takes half the bytes
            of half precision and slightly changes the distribution of the samples.

    Raises:
        TypeError, ValueError: a batch below 1, or another kv_dtype.
    """

    def __init__(
        self,
        model: GPT,
        batch: int,
        *,
        guided: bool = False,
        kv_dtype: torch.dtype | None = None,
    ):
        check_int("decoder", "batch", batch, 2**31, 1)
        check_kv_dtype("decoder", model, kv_dtype)
        self.batch, self.guided, self.kv_dtype = batch, guided, kv_dtype
        self._model = weakref.ref(model)
        self._made_for = _made_for(model)
        # The addresses that the graphs were captured with.
        self._addresses: tuple[int, ...] | None = None
        # Weights that are recomputed at each call, e.g. by a parametrization; graphs read them.
        self._computed: list[Tensor] = []
        self._busy = threading.Lock()
        config, device, rows = model.config, model.device, batch * (2 if guided else 1)

        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        # Inference tensors cannot be written outside inference mode, where the next call may run.
        with told_if_out_of_memory(batch), torch.inference_mode(False):
            self.cache = KVCache.empty(
                config.num_layers, rows, config.num_heads, config.block_size, config.head_dim,
                dtype=kv_dtype or model.dtype, device=device,
            )  # fmt: skip
            self.image_ids, self.codes = new(batch), new(batch, config.block_size)
            # The last code of each row, initially its class; rows are [conditional; unconditional].
            self.code = new(rows)
            # The position of the next code, and the cache length including it.
            self.at = new(2)
            self.seed = new(1)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}

    def generate(
        self,
        class_ids: Tensor | Sequence[int],
        *,
        image_ids: Tensor | None = None,
        progress: Progress | None = None,
        **sampling,
    ) -> Tensor:
        """Generate the codes of one image per class id, the same as `GPT.generate` does.

        Args:
            class_ids: [B] integers, B at most ``batch``; a smaller B takes as long as ``batch``.
            image_ids, progress: as in `GPT.generate`.
            sampling: cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, seed.

        Returns:
            int64 [B, block_size].

        Raises:
            TypeError, ValueError: as in `GPT.generate`; more images than ``batch``; guidance
                without ``guided``; another stream, dtype or device than the decoder was made for.
            RuntimeError: another call has not ended, or the model no longer exists.
        """
        model, settings = self._model(), Sampling.of("decoder", sampling)
        if model is None:
            raise RuntimeError("decoder: its model was freed; keep it as long as the decoder")
        class_ids, image_ids = checked_ids(model, class_ids, image_ids, settings)
        B = len(class_ids)
        if B > self.batch:
            raise ValueError(f"decoder: at most {self.batch} images at a time, got {B}")
        if settings.guided(0) and not self.guided:
            raise ValueError("decoder: guidance needs a decoder made with guided=True")
        if _made_for(model) != self._made_for:
            raise ValueError(
                "decoder: the model or the current stream has changed; make a new decoder"
            )
        return self.run(class_ids, image_ids, settings, progress)

    @torch.no_grad()
    def run(
        self, class_ids: Tensor, image_ids: Tensor, sampling: Sampling, progress: Progress | None
    ) -> Tensor:
        """`generate` for arguments that have been checked."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("decoder: another call is still running; make a decoder for each")
        try:
            # Streams and captures belong to the current device, which may be another one.
            with torch.cuda.device_of(self.code), told_if_out_of_memory(self.batch):
                return self._run(class_ids, image_ids, sampling, progress)
        finally:
            self._busy.release()

    def _run(
        self, class_ids: Tensor, image_ids: Tensor, sampling: Sampling, progress: Progress | None
    ) -> Tensor:
        model, B = self._model(), len(class_ids)
        config, weights, embeddings = model.config, model.step_weights(), model.embeddings()
        read = [weights.norm, weights.head, weights.rotary, *embeddings, *chain(*weights.blocks)]
        if (addresses := tuple(part.data_ptr() for part in read)) != self._addresses:
            self.end()
            self._addresses = addresses
            self._computed = [part for part in read if not isinstance(part, nn.Parameter)]
        self.image_ids[:B].copy_(image_ids)
        self.code.fill_(config.num_classes)
        # Rows beyond the images are computed too, with a class that exists.
        self.code[: self.batch].zero_()
        self.code[:B].copy_(class_ids)
        self.at.fill_(0)
        self.at[1:].add_(1)
        # torch holds no larger integers.
        self.seed.fill_(sampling.seed - 2**64 * (sampling.seed >= 2**63))
        replayed = model.device.type == "cuda" and switch.policy().ops >= STEP_OPS
        for step in range(config.block_size):
            guided = sampling.guided(step)
            cache = self.cache if guided == self.guided else self.cache.first_rows(self.batch)
            embedding = embeddings[step > 0]
            if replayed:
                self._replay(weights, cache, sampling, embedding)
            else:
                self._advance(weights, cache, sampling, embedding, step)
            if progress is not None:
                progress(B * (step + 1), B * config.block_size)
        return self.codes[:B].clone()

    def _advance(
        self, weights: StepWeights, cache: KVCache, sampling: Sampling, embedding: Tensor,
        at: int | Tensor,
    ) -> None:  # fmt: skip
        """Run one step: ``self.code`` gives the code of position ``at``, an int or ``self.at``.

        If ``at`` is a tensor, no value is read on the host, so the step can be captured, for any
        seed.
        """
        captured = isinstance(at, Tensor)
        position, length = at.split(1) if captured else (at, at + 1)
        code = self.code[: len(cache[0].keys)]
        logits = ops.decode_step(code, embedding, weights, cache, position, length)
        seed = self.seed if captured else None
        drawn = sampling.draw(logits, self.image_ids, position, seed)
        self.code.view(-1, self.batch).copy_(drawn)
        if captured:
            self.codes.index_copy_(1, position, drawn[:, None])
            at.add_(1)
        else:
            # Not codes[:, at]: torch.compile would compile a variant for every position.
            self.codes.select(1, at).copy_(drawn)

    def _replay(
        self, weights: StepWeights, cache: KVCache, sampling: Sampling, embedding: Tensor
    ) -> None:
        """Run one step on a GPU: eagerly the first time to warm up, then captured and replayed.

        A graph bakes in the sampling settings, except the seed, and the process's `settings`; a
        change of either captures anew.
        """
        rows = len(cache[0].keys)
        key = (replace(sampling, seed=0), settings(), rows, embedding.data_ptr())
        if key in self.graphs:
            self.graphs[key].replay()
            switch.record.replay("a decode step")
            return
        # Drop graphs of other settings, which would pile up. Three stay alive: the first step's,
        # and those of guided and unguided steps.
        if any(old[:2] != key[:2] for old in self.graphs):
            self.end()
        step = (weights, cache, sampling, embedding, self.at)
        # The warm-up run is this step; the captured run does not execute. The lock keeps out a
        # tokenizer that decodes in another thread: its TF32 setting would stay in the graph.
        with tf32.settled():
            self.graphs[key] = capture(lambda: self._advance(*step))

    def end(self) -> None:
        """Drop the graphs after waiting for the device: they may still be running."""
        if self.graphs:
            synchronize(self.code.device)
            self.graphs = {}

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, which are nearly all the memory that the decoder owns."""
        return sum(part.nbytes for layer in self.cache for part in layer if part is not None)


def checked_ids(
    model: GPT, class_ids: Tensor | Sequence[int], image_ids: Tensor | None, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Check ids and settings; return class and image ids, int64 [B] on the model's device."""
    if isinstance(class_ids, list | tuple | range):
        dtype = None if class_ids else torch.int64
        class_ids = torch.tensor(class_ids, dtype=dtype, device="cpu")
    check_class_ids("generate", class_ids, model.config.num_classes)
    sampling.check()
    if image_ids is None:
        image_ids = torch.arange(len(class_ids), device="cpu")
    else:
        check_integers("generate", "image_ids", image_ids, tuple(class_ids.shape))
    # Copies, because a stream reads them later.
    return tuple(ids.to(model.device, torch.int64, copy=True) for ids in (class_ids, image_ids))


def check_kv_dtype(who: str, model: GPT, kv_dtype: torch.dtype | None) -> None:
    if kv_dtype not in (None, model.dtype, torch.int8):
        raise ValueError(
            f"{who}: kv_dtype must be None, {model.dtype} or torch.int8, got {kv_dtype}"
        )


def _made_for(model: GPT) -> tuple:
    """What the buffers depend on: dtype, device, stream."""
    device = model.device
    # Nothing here knows whether a call on another stream has ended.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return model.dtype, device, stream


class Kept:
    """The last decoder of a model, kept for its next call. A copy of the model has none yet."""

    def __init__(self):
        # At most one element. Threads can share a list's append and pop without a lock.
        self._held: list[Decoder] = []

    @contextlib.contextmanager
    def decoder(
        self, model: GPT, batch: int, guided: bool, kv_dtype: torch.dtype | None
    ) -> Iterator[Decoder]:
        """Yield the kept decoder if it fits, else a new one; keep it afterwards, even on error."""
        decoder = self._take()
        if decoder is None or not (
            (decoder.batch, decoder.guided, decoder.kv_dtype) == (batch, guided, kv_dtype)
            and decoder._model() is model  # A shallow copy of the model shares this object.
            and decoder._made_for == _made_for(model)
        ):
            if decoder is not None:
                decoder.end()
            del decoder  # Free its memory first.
            decoder = Decoder(model, batch, guided=guided, kv_dtype=kv_dtype)
        try:
            yield decoder
        finally:
            other = self._take()  # Kept by a second thread, or by a call inside ``progress``.
            if type(decoder.codes) is Tensor:  # Keep no decoder of a fake tensor mode.
                self._held.append(decoder)
            if other is not None:
                other.end()

    def _take(self) -> Decoder | None:
        try:
            return self._held.pop()
        except IndexError:
            return None

    @property
    def nbytes(self) -> int:
        return sum(decoder.nbytes for decoder in tuple(self._held))

    def __reduce__(self) -> tuple:
        return Kept, ()
