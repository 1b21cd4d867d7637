"""Several processes that train one model, each on its share of a batch; one alone needs nothing.

All hold all weights, as in torch's DistributedDataParallel, and average their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    return dist.get_world_size() if _several() else 1


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in one exchange."""
    tensors = list(tensors)
    if not _several() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def largest(tensor: Tensor) -> Tensor:
    """The elementwise maximum over the processes, in place."""
    if _several():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def share_first(tensors: Iterable[Tensor]) -> None:
    """Give each tensor the values of the first process."""
    if _several():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def gather(values: list) -> list:
    """The lists of all processes, one after the other."""
    if not _several():
        return values
    found: list = [None] * world_size()
    dist.all_gather_object(found, values)
    return [value for part in found for value in part]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
