"""What generates: buffers, KV cache and CUDA graphs for a number of images of one model.

`Decoder` has the only loop over positions. A step is `ops.decode_step`, a draw and two small
copies; on a GPU, with these ops enabled, it is captured once and replayed. `GPT.generate` and
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
from ..graphs import capture, synchronize
from ..ops.checks import check_int, check_integers
from .memory import told_if_out_of_memory
from .sampling import Sampling

if TYPE_CHECKING:
    from .transformer import GPT

# Told (codes done, codes in all) after every position of a batch; may raise to stop.
Progress = Callable[[int, int], None]
# While all of these are enabled, a step on a GPU is captured and replayed.
STEP_OPS = frozenset(["decode_step", "decode_attention", "sample_token"])


class Decoder:
    """Generates up to ``batch`` images at a time; make one with `GPT.decoder`.

    It owns its buffers, which go when it goes, and no weights: a step reads the model's parameters
    where they are, so a change in place counts at once. One call at a time; on a GPU, on the stream
    that was current when it was made.

    Args:
        model: a `GPT`, which must outlive this.
        batch: images at a time.
        guided: whether classifier-free guidance can be asked for, which takes twice the memory.
        kv_dtype: of keys and values; None is the model's, ``torch.int8`` takes half of the bytes of
            half precision and changes the law of the samples a little.

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
        # Of what graphs were captured with.
        self._addresses: tuple[int, ...] | None = None
        # Weights that are made anew at each call, as by a parametrization: graphs read them.
        self._computed: list[Tensor] = []
        self._busy = threading.Lock()
        config, device, rows = model.config, model.device, batch * (2 if guided else 1)

        def new(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        # Tensors of inference mode cannot be written to outside of it, where the next call may be.
        with told_if_out_of_memory(batch), torch.inference_mode(False):
            self.cache = KVCache.empty(
                config.num_layers, rows, config.num_heads, config.block_size, config.head_dim,
                dtype=kv_dtype or model.dtype, device=device,
            )  # fmt: skip
            self.image_ids, self.codes = new(batch), new(batch, config.block_size)
            # The last code of each row, at first its class; rows are [conditional; unconditional].
            self.code = new(rows)
            # The position of the next code, and the length up to it.
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
        """Codes of one image per class id, the same as `GPT.generate` makes.

        Args:
            class_ids: [B] integers, B at most ``batch``; fewer take as long as all.
            image_ids, progress: as in `GPT.generate`.
            sampling: cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, seed.

        Returns:
            int64 [B, block_size].

        Raises:
            TypeError, ValueError: as `GPT.generate`; more images than ``batch``; guidance without
                ``guided``; another stream, dtype or device than this was made for.
            RuntimeError: another call has not ended, or the model is gone.
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
        """`generate` for arguments that were checked."""
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("decoder: another call is still running; make a decoder for each")
        try:
            # Streams and captures are the current device's, which may be another one.
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
        # Rows beyond the images compute along, of a class that exists.
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
        """One step: ``self.code`` gives the code of position ``at``, an int or ``self.at``.

        With a tensor no value is read on the host, so this can be captured, for any seed.
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
            # Not codes[:, at], of which torch.compile makes a variant for every position.
            self.codes.select(1, at).copy_(drawn)

    def _replay(
        self, weights: StepWeights, cache: KVCache, sampling: Sampling, embedding: Tensor
    ) -> None:
        """One step on a GPU: eagerly the first time, which warms up, then captured and replayed.

        Settings are baked into a graph, but for the seed, and so is what the switch takes; a change
        captures anew.
        """
        settings, rows = replace(sampling, seed=0), len(cache[0].keys)
        key = (settings, switch.policy(), switch.generation(), rows, embedding.data_ptr())
        if key in self.graphs:
            self.graphs[key].replay()
            switch.record.replay("a decode step")
            return
        # Graphs of other settings would pile up: three are alive, the first step's, guided and not.
        self.graphs = {old: graph for old, graph in self.graphs.items() if old[:3] == key[:3]}
        step = (weights, cache, sampling, embedding, self.at)
        # The step that warms up counts, the one that is recorded does not run.
        # Beside a tokenizer that decodes in another thread: its TF32 would stay in the graph.
        with tf32.settled():
            self.graphs[key] = capture(lambda: self._advance(*step))

    def end(self) -> None:
        """Drop the graphs, after they have ended: they may still be running."""
        if self.graphs:
            synchronize(self.code.device)
            self.graphs = {}

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, which are nearly all that this owns."""
        return sum(part.nbytes for layer in self.cache for part in layer if part is not None)


def checked_ids(
    model: GPT, class_ids: Tensor | Sequence[int], image_ids: Tensor | None, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Check what is to be generated; class ids and image ids int64 [B] on the model's device."""
    if isinstance(class_ids, list | tuple | range):
        dtype = None if class_ids else torch.int64
        class_ids = torch.tensor(class_ids, dtype=dtype, device="cpu")
    check_class_ids("generate", class_ids, model.config.num_classes)
    sampling.check()
    if image_ids is None:
        image_ids = torch.arange(len(class_ids), device="cpu")
    else:
        check_integers("generate", "image_ids", image_ids, tuple(class_ids.shape))
    # Copies, as a stream reads them later.
    return tuple(ids.to(model.device, torch.int64, copy=True) for ids in (class_ids, image_ids))


def check_kv_dtype(who: str, model: GPT, kv_dtype: torch.dtype | None) -> None:
    if kv_dtype not in (None, model.dtype, torch.int8):
        raise ValueError(
            f"{who}: kv_dtype must be None, {model.dtype} or torch.int8, got {kv_dtype}"
        )


def _made_for(model: GPT) -> tuple:
    """What buffers depend on: dtype, device, stream."""
    device = model.device
    # Of another stream's call nobody knows here whether it has ended.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
    return model.dtype, device, stream


class Kept:
    """The last decoder of a model, for its next call. A copy of the model has none yet."""

    def __init__(self):
        # Of one element at most. A list, whose append and pop threads can share without a lock.
        self._held: list[Decoder] = []

    @contextlib.contextmanager
    def decoder(
        self, model: GPT, batch: int, guided: bool, kv_dtype: torch.dtype | None
    ) -> Iterator[Decoder]:
        """The kept one if it fits, else a new one; kept afterwards, also after an error."""
        decoder = self._take()
        if decoder is None or not (
            (decoder.batch, decoder.guided, decoder.kv_dtype) == (batch, guided, kv_dtype)
            and decoder._model() is model  # A shallow copy shares what is kept.
            and decoder._made_for == _made_for(model)
        ):
            if decoder is not None:
                decoder.end()
            del decoder  # Its memory first.
            decoder = Decoder(model, batch, guided=guided, kv_dtype=kv_dtype)
        try:
            yield decoder
        finally:
            other = self._take()  # Of a second thread, or of a call from ``progress``.
            if type(decoder.codes) is Tensor:  # None of a fake tensor mode.
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
