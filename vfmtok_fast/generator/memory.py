"""Batch size of generation: how many images fit into memory at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..errors import is_out_of_memory

if TYPE_CHECKING:
    from .model import Generator

# The rest is left for other tensors, fragmentation and, on a CPU, other processes.
SHARE = 0.8
# Bytes of conditions, see `Generator.fill_condition`, that a decoder computes at a time: their
# weights are read once for as many places as this holds, at least one.
CONDITION_BYTES = 2**28
# Float32 logits and what sampling makes of them: noise, sorted values and their order.
LOGIT_COPIES = 12
# Batch sizes above which larger ones gain nothing and only delay results. Measured on two cores,
# GPT-B with guidance: 0.18, 0.49, 0.73, 0.86 and 0.86 images/s for batches of 2, 8, 32, 64 and 128.
# On an H200 the part of a GPT-L step that all images share is 4 % of it at 512 images (predicted).
ENOUGH = {"cpu": 64, "cuda": 512}


def capacity(model: Generator) -> int:
    """Places of a KV cache: a multiple of 8, so that kernels know that every head is aligned."""
    return -(-model.places // 8) * 8


def bytes_per_image(model: Generator, guided: bool, kv_dtype: torch.dtype | None = None) -> int:
    """Bytes that generating one image takes: its keys, values, conditions and rows of logits.

    Of the conditions, those of one place in both buffers; the others are at most CONDITION_BYTES
    for all images together.
    """
    config, rows = model.config, 2 if guided else 1
    cache = 2 * config.num_layers * capacity(model)
    each = config.dim * (kv_dtype or model.dtype).itemsize
    if kv_dtype == torch.int8:
        each += 4 * config.num_heads  # A scale for each head and position.
    conditions = 2 * model.condition_size * config.dim * model.dtype.itemsize
    return rows * (cache * each + conditions + 4 * LOGIT_COPIES * config.vocab_size)


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on ``device`` now, including torch's cached memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + reserved
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return 2**62  # Unknown, so nothing is split.
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])


def fastest_batch(
    model: Generator, count: int, guided: bool, batch_size: int | None, memory: int | None,
    kv_dtype: torch.dtype | None = None,
) -> int:  # fmt: skip
    """Return the batch size: ``batch_size``, or as many of ``count`` as fit and help throughput.

    Batches are nearly equal in size. ``memory`` limits the bytes that one batch may take; None is
    most of the free memory.

    Raises:
        MemoryError: ``batch_size`` images, or a single one, do not fit.
    """
    if memory is None:
        # The kept decoder is used again, or is freed first.
        memory = int(SHARE * (free_bytes(model.device) + model.kept.nbytes))
    each = bytes_per_image(model, guided, kv_dtype)
    ahead = (2 if guided else 1) * model.condition_size * model.config.dim * model.dtype.itemsize
    # Conditions of all places, or CONDITION_BYTES where that is less.
    most = max(memory // (each + model.places * ahead), (memory - CONDITION_BYTES) // each)
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
    """Raise MemoryError if the estimate was wrong or another process took the memory meanwhile."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if images == 1:
            advice = "out of memory with a single image; free some memory"
        else:
            advice = (
                f"out of memory with {images} images at a time; "
                f"stream(batch_size={images // 2}) takes half as much"
            )
        raise MemoryError(f"generate: {advice}") from error
