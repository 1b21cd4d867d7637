"""Training of one model by several processes, each on its share of a batch.

Either every process holds all weights and gradients are averaged, as in torch's
DistributedDataParallel, or each process holds a part of each weight (FSDP2) and torch gathers the
parts while a layer runs. A single process needs no setup.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    return dist.get_world_size() if _several() else 1


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, with one all-reduce."""
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
    """Take the elementwise maximum over the processes, in place."""
    if _several():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def share_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor with the values of the first process."""
    if _several():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def gather(values: list) -> list:
    """Concatenate the lists of all processes."""
    if not _several():
        return values
    found: list = [None] * world_size()
    dist.all_gather_object(found, values)
    return [value for part in found for value in part]


def shard(model: nn.Module, layers: Iterable[nn.Module] = (), whole: Iterable[Tensor] = ()) -> None:
    """Split each weight among the processes; ``layers`` are gathered one by one.

    Args:
        model: called as a module; during the call, everything outside ``layers`` is whole.
        layers: submodules of it.
        whole: weights that every process keeps whole.
    """
    from torch.distributed.fsdp import fully_shard

    for layer in layers:
        fully_shard(layer)
    fully_shard(model, ignored_params=set(whole))


def called_whole(model: nn.Module, method: str) -> None:
    """Gather a sharded model's weights for calls of a method too, as for calls of the model."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(model, method)


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole tensor; for a sharded one, all processes must call this."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def as_part_of(weight: Tensor, tensor: Tensor) -> Tensor:
    """Place a whole tensor like ``weight``: on its device and, if that is sharded, sharded too."""
    tensor = tensor.to(weight.device)
    if not isinstance(weight, DTensor):
        return tensor.clone()
    return distribute_tensor(tensor, weight.device_mesh, weight.placements, src_data_rank=None)


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
