"""How many images are generated at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .transformer import GPT

# The rest is left to other tensors, to fragmentation and, on a CPU, to other processes.
SHARE = 0.8
# Logits in float32, and what sampling makes of them: noise, sorted values and their order.
LOGIT_COPIES = 12
# Images at a time beyond which more gain nothing, and only come later. Measured on two cores, GPT-B
# guided: 0.18, 0.49, 0.73, 0.86, 0.86 images/s of 2, 8, 32, 64 and 128. On an H200 the part of a
# GPT-L step that all images share is 4 % of it for 512 of them (predicted).
ENOUGH = {"cpu": 64, "cuda": 512}


def bytes_per_image(model: GPT, guided: bool, kv_dtype: torch.dtype | None = None) -> int:
    """Bytes that one image takes while it is generated: keys, values and its rows of logits."""
    config, rows = model.config, 2 if guided else 1
    cache = 2 * config.num_layers * config.block_size
    each = config.dim * (kv_dtype or model.dtype).itemsize
    if kv_dtype == torch.int8:
        each += 4 * config.num_heads  # A scale for each head and position.
    return rows * (cache * each + 4 * LOGIT_COPIES * config.vocab_size)


def free_bytes(device: torch.device) -> int:
    """Bytes that can be had on ``device`` now, what torch holds in reserve among them."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return 2**62  # Unknown: nothing is split.
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def fastest_batch(
    model: GPT, count: int, guided: bool, batch_size: int | None, memory: int | None,
    kv_dtype: torch.dtype | None = None,
) -> int:  # fmt: skip
    """Images of a batch: ``batch_size``, or as many of ``count`` as fit and gain something.

    Batches are of nearly equal size. ``memory`` is how many bytes one may take; None is most of
    what is free.

    Raises:
        MemoryError: ``batch_size`` images, or a single one, do not fit.
    """
    if memory is None:
        # The kept decoder is used again, or makes room.
        memory = int(SHARE * (free_bytes(model.device) + model.kept.nbytes))
    each = bytes_per_image(model, guided, kv_dtype)
    most = memory // each
    wanted = min(batch_size or 1, max(count, 1))
    if most < wanted:
        advice = f"at most {most} fit" if most else "free some memory or use a smaller model"
        raise MemoryError(
            f"generate: {wanted} images at a time need {wanted * each / 2**20:.0f} MiB, "
            f"{memory / 2**20:.0f} MiB are available; {advice}"
        )
    if batch_size is not None:
        return batch_size
    batches = -(-count // min(most, ENOUGH.get(model.device.type, most)))
    return -(-count // batches) if count else 1


@contextlib.contextmanager
def told_if_out_of_memory(images: int) -> Iterator[None]:
    """MemoryError, where the estimate was wrong or another process took the memory meanwhile."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if images == 1:
            advice = "out of memory with a single image; free some memory"
        else:
            advice = (
                f"out of memory with {images} images at a time; "
                f"GPT.stream(batch_size={images // 2}) takes half as much"
            )
        raise MemoryError(f"generate: {advice}") from error
