"""Autoregressive generation: the methods `GPT.generate` and `GPT.stream`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import ops, switch
from ..ops.checks import check_class_ids, check_integers
from ..ops.sample_token import check_sampling
from . import engine
from .kv_cache import KVCache
from .memory import images_that_fit, out_of_memory

if TYPE_CHECKING:
    from .transformer import GPT

# Told (codes done, codes in all) after every position of a batch; may raise to stop.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sampling:
    """How codes are drawn; `generate` says what the fields mean."""

    cfg_scale: float = 1.0
    cfg_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise one line for a setting outside its range."""
        settings = {k: v for k, v in vars(self).items() if k not in ("cfg_interval", "greedy")}
        check_sampling("generate", **settings)
        interval = self.cfg_interval
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < -1:
            raise ValueError(f"generate: cfg_interval must be an integer from -1, got {interval!r}")

    def guided(self, step: int) -> bool:
        """Whether code ``step`` is guided; step s is the release's decode step s - 1."""
        return self.cfg_scale != 1.0 and (self.cfg_interval == -1 or step - 1 <= self.cfg_interval)

    def draw(self, logits: Tensor, image_ids: Tensor, step: int | Tensor) -> Tensor:
        """One code [B] per image; with twice as many rows of logits the rest is unconditional."""
        B = len(image_ids)
        settings = {k: v for k, v in vars(self).items() if k != "cfg_interval"}
        uncond = logits[B:] if len(logits) > B else None
        return ops.sample_token(logits[:B], image_ids, step, uncond_logits=uncond, **settings)


def generate(
    self: GPT,
    class_ids: Tensor,
    cfg_scale: float = 1.0,
    cfg_interval: int = -1,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    greedy: bool = False,
    seed: int = 0,
    image_ids: Tensor | None = None,
    *,
    use_cache: bool = True,
    progress: Progress | None = None,
) -> Tensor:
    """Generate the codes of one image per class id.

    The codes of an image are a function of (weights, class id, image id, seed, sampling settings):
    not of the batch, the order or the number of processes, up to logits tied within rounding.
    Dropout is off, whatever mode the model is in.

    While all ops of a step are enabled (`engine.STEP_OPS`), `generator.engine` runs the steps, on a
    GPU as CUDA graphs; else the plain loop below. `vfmtok_fast.status()` counts both.

    Args:
        class_ids: [B] integers in [0, num_classes).
        cfg_scale: classifier-free guidance, ``uncond + cfg_scale * (cond - uncond)``; 1 is none,
            0 is unconditional.
        cfg_interval: n > -1 guides the first code and decode steps 0..n, that is codes 0..n+1, and
            leaves the rest to the conditional logits; -1 guides all.
        temperature: divides the logits (at least 1e-5).
        top_k: keep the k largest logits, and ties; 0 keeps all.
        top_p: then keep the nucleus of this probability; 1 keeps all.
        greedy: take the arg-max instead of sampling.
        seed: in [0, 2^64).
        image_ids: [B] integers that name the images' noise; None is 0..B-1.
        use_cache: False recomputes every position at every step: slow, the oracle of the cache.
        progress: told (codes done, codes in all) after every position; may raise to stop.

    Returns:
        int64 [B, block_size], on the model's device.

    Raises:
        TypeError, ValueError: wrong shape, dtype, device or range.
        MemoryError: not even one image fits into memory. A batch that does not is split.

    Source: LlamaGen (arXiv 2406.06525), autoregressive/models/generate.py.
    """
    sampling = Sampling(cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, seed)
    batches = _batches(self, class_ids, image_ids, sampling, None, None, progress, use_cache)
    parts = [codes for _, codes in batches]
    empty = torch.empty(0, self.config.block_size, dtype=torch.int64, device=self.device)
    return torch.cat(parts or [empty])


def stream(
    self: GPT,
    class_ids: Tensor,
    *,
    batch_size: int | None = None,
    image_ids: Tensor | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
    **sampling,
) -> Iterator[tuple[slice, Tensor]]:
    """`generate` in batches, each handed out as soon as it is finished.

    On a GPU the codes may still be in the making when they are handed out, as any result of torch.

    Args:
        class_ids, image_ids, progress: as in `generate`.
        batch_size: images at a time; None is as many as fit into memory.
        memory: bytes that keys, values and logits may take; None is most of what is free now.
        sampling: cfg_scale, cfg_interval, temperature, top_k, top_p, greedy, seed.

    Returns:
        An iterator of (which images, their codes int64 [n, block_size]), in order.

    Raises:
        TypeError, ValueError: as `generate`, at once.
        MemoryError: ``batch_size`` images do not fit; the line says how many would.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int)):
        raise TypeError(f"stream: batch_size must be an int, got {type(batch_size).__name__}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"stream: batch_size must be at least 1, got {batch_size}")
    settings = Sampling(**sampling)
    return _batches(self, class_ids, image_ids, settings, batch_size, memory, progress, True)


def _batches(
    self: GPT, class_ids: Tensor, image_ids: Tensor | None, sampling: Sampling,
    batch_size: int | None, memory: int | None, progress: Progress | None, use_cache: bool,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Check everything now, and return the iterator of finished batches."""
    config, device = self.config, self.device
    check_class_ids("generate", class_ids, config.num_classes)
    sampling.check()
    B = class_ids.shape[0]
    if image_ids is None:
        image_ids = torch.arange(B)
    else:
        check_integers("generate", "image_ids", image_ids, (B,))
    class_ids, image_ids = class_ids.long().to(device), image_ids.long().to(device)
    size = images_that_fit(self, B, sampling.guided(0), batch_size, memory)
    return _finished(self, class_ids, image_ids, sampling, size, progress, use_cache)


@torch.no_grad()
def _finished(
    self: GPT, class_ids: Tensor, image_ids: Tensor, sampling: Sampling, size: int,
    progress: Progress | None, use_cache: bool,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    count, length = len(class_ids), self.config.block_size
    for first in range(0, count, size):
        images = slice(first, min(first + size, count))
        n = images.stop - first

        def tell(step: int, first: int = first, n: int = n) -> None:
            if progress is not None:
                progress(first * length + n * (step + 1), count * length)

        fast = use_cache and engine.wanted()
        switch.record_path("generate", "engine" if fast else "reference")
        try:
            if fast:
                codes = engine.run(self, class_ids[images], image_ids[images], sampling, tell)
            else:
                codes = _loop(self, class_ids[images], image_ids[images], sampling, tell, use_cache)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(n) from error
        yield images, codes


def _loop(
    self: GPT, class_ids: Tensor, image_ids: Tensor, sampling: Sampling,
    tell: Callable[[int], None], use_cache: bool,
) -> Tensor:  # fmt: skip
    """The reference: one position after another, each op on its own."""
    config, device, B = self.config, class_ids.device, len(class_ids)
    guided = sampling.guided(0)
    classes = class_ids
    if guided:  # Rows [conditional; unconditional].
        classes = torch.cat([class_ids, torch.full_like(class_ids, config.num_classes)])
    codes = torch.empty(B, config.block_size, dtype=torch.int64, device=device)
    cache = KVCache(config, len(classes), device, self.dtype) if use_cache else None

    trained = [module for module in self.modules() if module.training]
    self.eval()
    try:
        for step in range(config.block_size):
            if guided and not sampling.guided(step):
                guided, classes = False, class_ids
                if cache is not None:
                    cache = cache.first_rows(B)
            repeat = 2 if guided else 1
            if cache is None:
                x = self.embed(classes, codes[:, :step].repeat(repeat, 1))
                logits = self.predict(x)[:, -1]
            elif step == 0:
                logits = self.step(self.class_embedding(classes), cache, step)
            else:
                x = self.token_embedding(codes[:, step - 1].repeat(repeat))
                logits = self.step(x, cache, step)
            codes[:, step] = sampling.draw(logits, image_ids, step)
            tell(step)
    finally:
        for module in trained:
            module.training = True
    return codes
