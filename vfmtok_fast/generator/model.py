"""What all generators are: models that predict codes place by place, and generate images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..decoding import StepWeights
from ..functional import is_unhooked
from ..hub import HubModel
from ..ops.checks import check_int
from .decoder import Decoder, Progress
from .generate import batches
from .sampling import Sampling


class Generator(HubModel):
    """A class-conditional autoregressive model of VFMTok codes: `GPT` or `RAR`.

    A sequence has a few places before the first code, the last of which is the class. Subclasses
    set ``config`` and ``kept``, and say what a decoding step reads.
    """

    # How many tensors [C] a step reads that depend on class and place; see `fill_condition`.
    condition_size = 0

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    @property
    def dtype(self) -> torch.dtype:
        return self.anchor.dtype

    @property
    def anchor(self) -> Tensor:
        """A weight that no adapter replaces, whose device and dtype are the model's."""
        raise NotImplementedError

    def step_weights(self, condition: Tensor | None = None) -> StepWeights:
        """Return all weights except the embeddings, in the form that `ops.decode_step` reads.

        Args:
            condition: one place of what `fill_condition` made, [R, condition_size, C].

        Raises:
            TypeError: a layer that was replaced, adapted or hooked, or a subclass that computes
                something else.
            ValueError: a norm with another eps than the config's.
        """
        raise NotImplementedError

    def embeddings(self) -> tuple[Tensor, ...]:
        """Return the tables that decoding steps look up: one per place before codes, then codes.

        The first ones are indexed by class, with num_classes for "no class".
        """
        raise NotImplementedError

    def fill_condition(self, out: Tensor, class_ids: Tensor, first: int) -> None:
        """Compute what steps read besides weights, ahead of time.

        Args:
            out: [P, R, condition_size, C], for places ``first`` to ``first + P - 1``.
            class_ids: [R].
        """
        raise NotImplementedError

    @property
    def places(self) -> int:
        """How many places of a sequence are computed: all but the last code's."""
        return len(self.embeddings()) - 2 + self.config.block_size

    def decoder(
        self, batch: int, *, guided: bool = False, kv_dtype: torch.dtype | None = None
    ) -> Decoder:
        """Return a `Decoder` of ``batch`` images, to control its memory and lifetime yourself."""
        return Decoder(self, batch, guided=guided, kv_dtype=kv_dtype)

    def generate(
        self,
        class_ids: Tensor | Sequence[int],
        cfg_scale: float = 1.0,
        cfg_interval: int = -1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        greedy: bool = False,
        seed: int = 0,
        image_ids: Tensor | None = None,
        *,
        kv_dtype: torch.dtype | None = None,
        cfg_power: float | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Generate the codes of one image per class id.

        The codes of an image are a function of (weights, class id, image id, seed, sampling
        settings). They do not depend on the batch, the order or the number of processes, except
        where logits are tied within rounding. Dropout is off, whatever mode the model is in.

        The images are split into batches if they do not fit at once or larger batches gain nothing.
        The model keeps the `Decoder` of its last call, with its buffers and CUDA graphs.

        Args:
            class_ids: [B] integers in [0, num_classes), a tensor or a list.
            cfg_scale: classifier-free guidance, ``uncond + cfg_scale * (cond - uncond)``; 1 is
                none, 0 is unconditional. (LlamaGen's own sampler guides above 1 only; RAR's takes 0
                for none.)
            cfg_interval: n > -1 guides the first code and decode steps 0..n, that is codes 0..n+1,
                and draws the others from the conditional logits; -1 guides all.
            temperature: divides the logits; values below 1e-5 count as 1e-5.
            top_k: keep the k largest logits, and ties; 0 keeps all.
            top_p: then keep the nucleus of this probability; 1 keeps all.
            greedy: take the arg-max instead of sampling.
            seed: in [0, 2^64).
            image_ids: [B] integers that select each image's noise; None is 0..B-1.
            kv_dtype: dtype of keys and values, see `Decoder`.
            cfg_power: guide code s of n with ``1 + (cfg_scale - 1) * (1 - cos(pi * (s / n) **
                cfg_power)) / 2``, which goes from 1 to nearly ``cfg_scale``, as RAR's sampler does;
                None guides all codes alike.
            progress: called with (codes done, codes in all) after every position; may raise to
                stop.

        Returns:
            int64 [B, block_size], on the model's device.

        Raises:
            TypeError, ValueError: wrong shape, dtype, device or range; a layer with an adapter or
                a hook, because steps read weights and call no layer.
            MemoryError: not even one image fits into memory.

        Source: LlamaGen (arXiv 2406.06525), autoregressive/models/generate.py; for ``cfg_power``
        RAR (arXiv 2411.00776).
        """
        sampling = Sampling(
            cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, seed, cfg_power
        )
        made = batches(self, class_ids, image_ids, sampling, progress=progress, kv_dtype=kv_dtype)
        parts = [codes for _, codes in made]
        empty = torch.empty(0, self.config.block_size, dtype=torch.int64, device=self.device)
        return torch.cat(parts or [empty])

    def stream(
        self,
        class_ids: Tensor | Sequence[int],
        *,
        batch_size: int | None = None,
        image_ids: Tensor | None = None,
        memory: int | None = None,
        kv_dtype: torch.dtype | None = None,
        progress: Progress | None = None,
        **sampling,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Run `generate` in batches, and yield each batch as soon as it is finished.

        On a GPU, the codes may still be computing when they are yielded, like any result of torch.

        Args:
            class_ids, image_ids, kv_dtype, progress: as in `generate`.
            batch_size: images at a time; None is as many as fit and improve throughput.
            memory: bytes that keys, values, conditions and logits may take; None is most of what is
                free now.
            sampling: cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, seed, cfg_power.

        Returns:
            An iterator of (which images, their codes int64 [n, block_size]), in order.

        Raises:
            TypeError, ValueError: as in `generate`, raised by the call itself.
            MemoryError: ``batch_size`` images do not fit; the message says how many would.
        """
        if batch_size is not None:
            check_int("stream", "batch_size", batch_size, 2**31, 1)
        if memory is not None:
            check_int("stream", "memory", memory, 2**63)
        return batches(
            self, class_ids, image_ids, Sampling.of("stream", sampling), batch_size=batch_size,
            memory=memory, progress=progress, kv_dtype=kv_dtype,
        )  # fmt: skip


def is_plain(module: nn.Module, *kinds: type[nn.Module], bias: bool = False) -> bool:
    """Whether calling a module runs the forward pass of one of these classes, and nothing else."""
    return (
        type(module).forward in [kind.forward for kind in kinds]
        and is_unhooked(module)
        and (bias or getattr(module, "bias", None) is None)
    )


def check_plain(module: nn.Module, *kinds: type[nn.Module], bias: bool = False) -> None:
    """Require `is_plain` of a module whose weights decoding steps read."""
    if not is_plain(module, *kinds, bias=bias):
        without = "" if bias else " without bias or hooks"
        raise TypeError(
            f"generate: needs plain layers{without}, because it reads their weights, "
            f"got {type(module).__name__}; first merge adapters, and remove hooks and pruning"
        )


def check_eps(norms: Sequence[nn.Module], eps: float) -> None:
    """Require the config's eps of all norms, because a step uses one."""
    if other := [norm.eps for norm in norms if norm.eps != eps]:
        raise ValueError(
            f"generate: every norm must have the config's norm_eps {eps}, got {other[0]}"
        )
