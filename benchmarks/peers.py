"""Other implementations of deformable sampling, if they are installed; nothing is downloaded.

They take final locations in [0, 1]. The compiled ones also take final weights, so the softmax is
part of the timed call. An implementation that is missing says how to install it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Images per call of the compiled op; must divide the batch.
IMAGES_AT_A_TIME = 64
HUB_KERNEL = "kernels-community/deformable-detr"
# How to install each, in order to measure it.
GET_DEFORMOPS = "pip install deformops"
GET_EXTENSION = "build models/ops of Deformable DETR with nvcc, against this torch"
GET_KERNELS = "pip install kernels"
GET_HUB_KERNEL = f"python -c 'import kernels; kernels.get_kernel(\"{HUB_KERNEL}\")' fetches it"


class NotHere(Exception):
    """The reason why a peer cannot be measured on this machine."""


def deformops() -> Callable[..., Tensor]:
    """``deformops`` from PyPI: Triton kernels, with atomics in the backward pass."""
    try:
        from deformops.registry import msda
    except ImportError as error:
        raise NotHere(f"deformops cannot be imported: {error} ({GET_DEFORMOPS})") from error

    def call(value, sizes, starts, place, logits):
        return msda(value, sizes, starts, place, logits, method="softmax").flatten(2, -1)

    return call


def compiled_extension() -> Callable[..., Tensor]:
    """``MultiScaleDeformableAttention``: the CUDA extension that detectors and VFMTok build."""
    try:
        return _autograd(importlib.import_module("MultiScaleDeformableAttention"))
    except (ImportError, AttributeError) as error:
        why = f"MultiScaleDeformableAttention cannot be used: {error} ({GET_EXTENSION})"
        raise NotHere(why) from error


def from_the_hub() -> Callable[..., Tensor]:
    """``kernels-community/deformable-detr`` via Hugging Face ``kernels``, if it is cached."""
    module = _cached_kernel()
    try:
        return _autograd(module)
    except AttributeError as error:
        raise NotHere(f"{HUB_KERNEL} cannot be used: {error}") from error


@functools.cache
def _cached_kernel() -> ModuleType:
    try:
        from huggingface_hub import constants

        from kernels import get_kernel
    except ImportError as error:
        why = f"Hugging Face kernels cannot be imported: {error} ({GET_KERNELS})"
        raise NotHere(why) from error
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        return get_kernel(HUB_KERNEL, revision="main")
    except Exception as error:
        # A missing file can raise many kinds of errors.
        lines = str(error).splitlines() or [""]
        why = f"{HUB_KERNEL} is not in the local cache ({GET_HUB_KERNEL}), or cannot be loaded"
        raise NotHere(f"{why}: {type(error).__name__}: {lines[0]:.120}") from error
    finally:
        constants.HF_HUB_OFFLINE = before


def _autograd(module: ModuleType) -> Callable[..., Tensor]:
    """Wrap the two functions of a compiled op in one differentiable function."""
    forward, backward = module.ms_deform_attn_forward, module.ms_deform_attn_backward

    class Sample(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value, sizes, starts, place, weights):
            ctx.step = min(IMAGES_AT_A_TIME, len(value))
            ctx.save_for_backward(value, sizes, starts, place, weights)
            return forward(value, sizes, starts, place, weights, ctx.step)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor):
            saved = ctx.saved_tensors
            of_value, of_place, of_weights = backward(*saved, gradient.contiguous(), ctx.step)
            return of_value, None, None, of_place, of_weights

    def call(value, sizes, starts, place, logits):
        weights = logits.softmax(-1).view(place.shape[:-1])
        return Sample.apply(value, sizes, starts, place, weights)

    return call
