"""Generation of many images in batches, shared by `generate` and `stream`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .decoder import Progress, check_kv_dtype, checked_ids
from .memory import fastest_batch
from .sampling import Sampling

if TYPE_CHECKING:
    from .model import Generator


def batches(
    model: Generator, class_ids: Tensor | Sequence[int], image_ids: Tensor | None,
    sampling: Sampling, *, batch_size: int | None = None, memory: int | None = None,
    progress: Progress | None = None, kv_dtype: torch.dtype | None = None,
) -> Iterator[tuple[slice, Tensor]]:  # fmt: skip
    """Check everything now, and return an iterator of finished batches and their codes."""
    class_ids, image_ids = checked_ids(model, class_ids, image_ids, sampling)
    check_kv_dtype("generate", model, kv_dtype)
    count, guided = len(class_ids), sampling.guided(0)
    size = fastest_batch(model, count, guided, batch_size, memory, kv_dtype)
    length = model.config.block_size

    def finished() -> Iterator[tuple[slice, Tensor]]:
        for first in range(0, count, size):
            images = slice(first, min(first + size, count))

            def told(done: int, total: int, before: int = first * length) -> None:
                if progress is not None:
                    progress(before + done, count * length)

            # A smaller last batch uses part of the buffers and graphs of the others.
            with model.kept.decoder(model, min(size, count), guided, kv_dtype) as decoder:
                codes = decoder.run(class_ids[images], image_ids[images], sampling, told)
            yield images, codes

    return finished()
