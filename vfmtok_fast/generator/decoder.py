"""The generation loop of a model: buffers, KV cache and CUDA graphs for a fixed number of images.

`Decoder` has the only loop over places. A step is `ops.decode_step`, a draw and two small copies.
On a GPU with these ops enabled, the step is captured once and replayed. `Generator.generate` and
`Generator.stream` keep the last decoder of their model, see `Kept`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops, switch, tf32
from ..checks import check_class_ids
from ..decoding import KVCache, StepWeights
from ..graphs import capture, settings, synchronize
from ..ops.checks import check_int, check_integers
from .memory import CONDITION_BYTES, capacity, told_if_out_of_memory
from .sampling import Sampling

if TYPE_CHECKING:
    from .model import Generator

# Called with (codes done, codes in all) after every position of a batch; may raise to stop.
Progress = Callable[[int, int], None]
# While all of these are enabled, a step on a GPU is captured and replayed.
STEP_OPS = frozenset(["decode_step", "decode_attention", "sample_token"])


class Decoder:
    """Generates up to ``batch`` images at a time; make one with `Generator.decoder`.

    A decoder owns its buffers, which are freed with it, but no weights: a step reads the model's
    parameters in place, so an in-place change takes effect at once. It runs one call at a time; on
    a GPU, on the stream that was current when it was made.

    Args:
        model: a generator, which must outlive the decoder.
        batch: images at a time.
        guided: whether classifier-free guidance can be used, which takes twice the memory.
        kv_dtype: dtype of keys and values. None is the model's. ``torch.int8`` takes half the bytes
            of half precision and slightly changes the distribution of the samples.

    Raises:
        TypeError, ValueError: a batch below 1, or another kv_dtype.
    """

    def __init__(
        self,
        model: Generator,
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
        # Places in all, and those before the one that predicts the first code.
        self.places = model.places
        self.before = self.places - config.block_size
        # What one place reads, and the same of as many places as are computed at a time.
        self.condition = self.conditions = None
        size, C = model.condition_size, config.dim

        def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # Inference tensors cannot be written outside inference mode, where the next call may run.
        with told_if_out_of_memory(batch), torch.inference_mode(False):
            self.cache = KVCache.empty(
                config.num_layers, rows, config.num_heads, capacity(model), config.head_dim,
                dtype=kv_dtype or model.dtype, device=device,
            )  # fmt: skip
            self.image_ids, self.codes = new(batch), new(batch, config.block_size)
            # The last code of each row, initially its class; rows are [conditional; unconditional].
            self.code, self.classes = new(rows), new(rows)
            # The next place, the cache length including it, and which code it predicts.
            self.at = new(3)
            self.seed, self.scales = new(1), new(config.block_size, dtype=torch.float32)
            if size:
                each = rows * size * C * model.dtype.itemsize
                span = min(self.places, max(1, CONDITION_BYTES // each))
                self.conditions = new(span, rows, size, C, dtype=model.dtype)
                self.condition = new(rows, size, C, dtype=model.dtype)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}

    def generate(
        self,
        class_ids: Tensor | Sequence[int],
        *,
        image_ids: Tensor | None = None,
        progress: Progress | None = None,
        **sampling,
    ) -> Tensor:
        """Generate the codes of one image per class id, the same as `Generator.generate` does.

        Args:
            class_ids: [B] integers, B at most ``batch``; a smaller B takes as long as ``batch``.
            image_ids, progress: as in `Generator.generate`.
            sampling: cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, seed, cfg_power.

        Returns:
            int64 [B, block_size].

        Raises:
            TypeError, ValueError: as in `Generator.generate`; more images than ``batch``; guidance
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
        config, embeddings = model.config, model.embeddings()
        weights = whole = model.step_weights(self.condition)
        read = [*weights.tensors(), *embeddings]
        if (addresses := tuple(part.data_ptr() for part in read)) != self._addresses:
            self.end()
            self._addresses = addresses
            # Parameters and the decoder's own buffer are not held by it, and neither are views.
            lasting = [*model.parameters(), *(() if self.condition is None else (self.condition,))]
            known = {part.untyped_storage()._cdata for part in lasting}
            self._computed = [p for p in read if p.untyped_storage()._cdata not in known]
        self.image_ids[:B].copy_(image_ids)
        self.classes.fill_(config.num_classes)
        # Rows beyond the images are computed too, with a class that exists.
        self.classes[: self.batch].zero_()
        self.classes[:B].copy_(class_ids)
        self.code.copy_(self.classes)
        for part, value in zip(self.at.split(1), (0, 1, -self.before), strict=True):
            part.fill_(value)
        if (scales := sampling.scales(config.block_size, model.device)) is not None:
            self.scales.copy_(scales)
        # torch holds no larger integers.
        self.seed.fill_(sampling.seed - 2**64 * (sampling.seed >= 2**63))
        replayed = model.device.type == "cuda" and switch.policy().ops >= STEP_OPS
        cache = self.cache
        for place in range(self.places):
            step = max(0, place - self.before)
            rows = len(self.code) if sampling.guided(step) == self.guided else self.batch
            if rows != len(cache[0].keys):
                cache, weights = self.cache.first_rows(rows), whole.first_rows(rows)
            if self.conditions is not None and place % len(self.conditions) == 0:
                part = self.conditions[: self.places - place]
                with tf32.settled():  # as for a capture, see `_replay`
                    model.fill_condition(part, self.classes, place)
            embedding = embeddings[min(place, self.before + 1)]
            arguments = weights, cache, sampling, embedding, place >= self.before
            if replayed:
                self._replay(*arguments)
            else:
                self._advance(*arguments, place)
            if progress is not None and place >= self.before:
                progress(B * (step + 1), B * config.block_size)
        return self.codes[:B].clone()

    def _advance(
        self, weights: StepWeights, cache: KVCache, sampling: Sampling, embedding: Tensor,
        draws: bool, at: int | Tensor,
    ) -> None:  # fmt: skip
        """Run one step: ``self.code`` gives the code of place ``at``, an int or ``self.at``.

        If ``at`` is a tensor, no value is read on the host, so the step can be captured, for any
        seed. Without ``draws`` the place predicts no code.
        """
        captured = isinstance(at, Tensor)
        place, length, step = at.split(1) if captured else (at, at + 1, at - self.before)
        if self.condition is not None:
            at_hand = place % len(self.conditions)
            if captured:
                torch.index_select(self.conditions, 0, at_hand, out=self.condition[None])
            else:
                self.condition.copy_(self.conditions[at_hand])
        code = self.code[: len(cache[0].keys)]
        logits = ops.decode_step(code, embedding, weights, cache, place, length)
        if draws:
            seed = self.seed if captured else None
            scales = None if sampling.cfg_power is None else self.scales
            drawn = sampling.draw(logits, self.image_ids, step, scales, seed)
            self.code.view(-1, self.batch).copy_(drawn)
            if captured:
                self.codes.index_copy_(1, step, drawn[:, None])
            else:
                # Not codes[:, step]: torch.compile would compile a variant for every position.
                self.codes.select(1, step).copy_(drawn)
        if captured:
            at.add_(1)

    def _replay(
        self, weights: StepWeights, cache: KVCache, sampling: Sampling, embedding: Tensor,
        draws: bool,
    ) -> None:  # fmt: skip
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
        # Drop graphs of other settings, which would pile up. Three stay alive, or four: one for
        # each place up to the first code's, and those of guided and unguided steps.
        if any(old[:2] != key[:2] for old in self.graphs):
            self.end()
        step = (weights, cache, sampling, embedding, draws, self.at)
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
        """Bytes of keys, values and conditions, nearly all the memory that the decoder owns."""
        parts = [self.condition, self.conditions, *(part for layer in self.cache for part in layer)]
        return sum(part.nbytes for part in parts if part is not None)


def checked_ids(
    model: Generator,
    class_ids: Tensor | Sequence[int],
    image_ids: Tensor | None,
    sampling: Sampling,
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


def check_kv_dtype(who: str, model: Generator, kv_dtype: torch.dtype | None) -> None:
    if kv_dtype not in (None, model.dtype, torch.int8):
        raise ValueError(
            f"{who}: kv_dtype must be None, {model.dtype} or torch.int8, got {kv_dtype}"
        )


def _made_for(model: Generator) -> tuple:
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
        self, model: Generator, batch: int, guided: bool, kv_dtype: torch.dtype | None
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
