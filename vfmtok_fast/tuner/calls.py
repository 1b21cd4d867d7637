"""The op calls that the models make: what `tune` times and `make aot` compiles.

A `Call` is plain data, so it can be sent to another process; `Call.arguments` creates its tensors
on any device. `model_calls` lists the calls of a tokenizer and of generators, most important first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..decoding import Biases, BlockWeights, HeadNorms, KVCache, StepWeights
from ..generator import GPTConfig
from ..ops import decode_attention
from ..tokenizer import VFMTokConfig

# Gradients of values, offsets and logits; the model's reference points are fixed.
BY_DEFORMABLE = (0, 3, 4)
# Creates a tensor of a given size and dtype: random, or uninitialised if its values are never read.
New = Callable[..., Tensor]


@dataclass(frozen=True)
class Call:
    """One call of an op.

    ``sizes`` holds the numbers that determine its arguments. ``backward`` holds the positions of
    the arguments whose gradients are computed too.
    """

    op: str
    what: str
    dtype: str
    sizes: dict[str, Any] = field(hash=False)
    backward: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.op} {self.what} {self.dtype}{', with backward' if self.backward else ''}"

    def arguments(
        self, device: torch.device, empty: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments; ``empty`` leaves values uninitialised."""
        dtype = getattr(torch, self.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            if empty:
                return torch.empty(shape, dtype=dtype, device=device)
            wide = torch.randn(shape, generator=generator, device=device)
            return (wide * 20).to(dtype) if dtype == torch.int8 else wide.to(dtype)

        args, kwargs = _MAKERS[self.op](new, device, **self.sizes)
        for i in self.backward:
            args[i].requires_grad_()
        return args, kwargs

    def run(self, function: Callable, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """Call ``function``; return its outputs, then all gradients if ``backward`` is set."""
        with torch.set_grad_enabled(bool(self.backward)):
            out = function(*args, **kwargs)
        outputs = list(out) if isinstance(out, tuple) else [out]
        if not self.backward:
            return outputs
        inputs = [args[i] for i in self.backward]
        # Any output gradient that is not constant will do.
        values = [one.detach() for one in outputs]
        return [*values, *torch.autograd.grad(outputs, inputs, values)]


def _add_norm(new: New, device, *, rows: int, C: int, scaled: bool):
    x, vectors = new(rows, C), [new(C) for _ in range(3)]
    scale = vectors.pop() if scaled else None
    return (x, new(rows, C), *vectors[:2], scale, 1e-6, x.dtype), {}


def _linear(new: New, device, *, rows: int, K: int, N: int, activation: str | None):
    return (new(rows, K), new(N, K), new(N), activation), {}


def _patch_embed(new: New, device, *, B: int, side: int, P: int, C: int):
    images = new(B, 3, side, side, dtype=torch.float32)
    statistics = (new(3, dtype=torch.float32), new(3, dtype=torch.float32).abs() + 0.1)
    return (images, *statistics, new(C, 3, P, P), new(C)), {}


def _linear_cross_entropy(
    new: New, device, *, N: int, C: int, V: int, smoothing: float = 0.0, reduction: str = "mean"
):  # fmt: skip
    targets = torch.arange(N, device=device) % V
    return (new(N, C), new(V, C), targets, None, -100, smoothing, reduction), {}


def _nearest_code(new: New, device, *, N: int, K: int, d: int, **keywords):
    return (new(N, d), new(K, d)), keywords


def _deformable_sample(new: New, device, *, B: int, Q: int, H: int, D: int, P: int, levels, **keys):
    levels = tuple(tuple(level) for level in levels)
    L, pixels = len(levels), sum(height * width for height, width in levels)
    # Queries are spread over the whole map, as in the model.
    side = math.ceil(math.sqrt(Q))
    centres = (torch.arange(side * side, device=device)[:Q].float() + 0.5) / side
    points = torch.stack([centres % 1, (centres / side)], dim=-1)[None, :, None].expand(1, Q, L, 2)
    offsets, logits = new(B, Q, H, L, P, 2), new(B, Q, H, L * P)
    value = new(B, pixels, H, D)
    return (value, levels, points.to(value.dtype).contiguous(), offsets, logits), keys


def _decode_attention(
    new: New, device, *, B: int, H: int, G: int, T: int, D: int, length: int,
    int8_cache: bool = False,
):  # fmt: skip
    at = torch.full((1,), length, device=device, dtype=torch.int64)
    q = new(B, H, D)
    if not int8_cache:
        return (q, new(B, G, T, D), new(B, G, T, D), at), {}
    cache = [new(B, G, T, D, dtype=torch.int8) for _ in range(2)]
    scales = [new(B, G, T, dtype=torch.float32).abs() / 20 for _ in range(2)]
    return (q, *cache, at), {"k_scale": scales[0], "v_scale": scales[1]}


def _sample_token(new: New, device, *, B: int, V: int, guided: bool = True, **settings):
    step = torch.zeros(1, device=device, dtype=torch.int64)
    settings["seed"] = torch.zeros(1, device=device, dtype=torch.int64)
    if guided:
        settings["uncond_logits"] = new(B, V)
    return (new(B, V), torch.arange(B, device=device), step), settings


def _decode_step(
    new: New, device, *, rows: int, layers: int, C: int, H: int, F: int, V: int, T: int,
    position: int, int8_cache: bool = False, rar: bool = False,
):  # fmt: skip
    D = C // H

    def block() -> BlockWeights:
        if not rar:
            return BlockWeights(new(C), new(3 * C, C), new(C, C), new(C), new(2 * F, C), new(C, F))
        return BlockWeights(
            None, new(3 * C, C), new(C, C), None, new(F, C), new(C, F),
            Biases(new(3 * C), new(C), new(F), new(C)), HeadNorms(new(D), new(D), new(D), new(D)),
            new(rows, 6, C),
        )  # fmt: skip

    blocks = tuple(block() for _ in range(layers))
    if rar:
        weights = StepWeights(
            blocks, None, new(V, C), None, head_bias=new(V), condition=new(rows, 3, C)
        )
    else:
        rotary = new(T, D // 2, 2, dtype=torch.float32)
        weights = StepWeights(blocks, new(C), new(V, C), rotary)
    dtype = torch.int8 if int8_cache else weights.head.dtype
    cache = KVCache.empty(layers, rows, H, T, D, dtype=dtype, device=device)
    for layer in cache:
        for part in layer:
            if part is not None:
                part.copy_(new(*part.shape, dtype=part.dtype))
    at = torch.full((2,), position, device=device, dtype=torch.int64)
    at[1:] += 1
    code = torch.zeros(rows, device=device, dtype=torch.int64)
    return (code, new(1, C), weights, cache, at[:1], at[1:]), {"attend": decode_attention}


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _group_norm_silu(new: New, device, *, B: int, C: int, side: int, groups: int):
    return (_last(new(B, C, side, side)), new(C), new(C), groups, 1e-6), {}


def _residual_block(new: New, device, *, B: int, C: int, out: int, side: int, groups: int):
    convs = [(_last(new(out, i, 3, 3)), new(out)) for i in (C, out)]
    norms = [(new(i), new(i)) for i in (C, out)]
    shortcut = None if C == out else (new(out, C, 1, 1), new(out))
    x = _last(new(B, C, side, side))
    return (x, norms[0], convs[0], norms[1], convs[1], shortcut, groups, 1e-6), {}


_MAKERS = {
    "add_norm": _add_norm,
    "decode_attention": _decode_attention,
    "decode_step": _decode_step,
    "deformable_sample": _deformable_sample,
    "group_norm_silu": _group_norm_silu,
    "linear": _linear,
    "linear_cross_entropy": _linear_cross_entropy,
    "nearest_code": _nearest_code,
    "patch_embed": _patch_embed,
    "residual_block": _residual_block,
    "sample_token": _sample_token,
}


def model_calls(
    tokenizer: VFMTokConfig | None, generators: Iterable[tuple[str, GPTConfig]] = ()
) -> list[Call]:
    """Return the calls of a tokenizer and of named generators, most important first."""
    calls = [*(tokenizer_calls(tokenizer) if tokenizer is not None else ())]
    for name, config in generators:
        calls += generator_calls(name, config)
    return list(dict.fromkeys(calls))


def tokenizer_calls(config: VFMTokConfig) -> list[Call]:
    K, d, regions = config.codebook_size, config.codebook_dim, config.num_regions
    side = config.feature_grid
    shape = {"Q": regions, "H": config.num_heads, "D": config.dim // config.num_heads}
    shape |= {"P": config.num_points, "levels": ((side, side),) * len(config.backbone.levels)}
    calls = []
    for B in (256, 64, 1):
        lookup = {"N": regions * B, "K": K, "d": d}
        calls.append(Call("nearest_code", f"{B} images", "float32", lookup))
        for dtype in ("bfloat16", "float32"):
            calls.append(Call("deformable_sample", f"{B} images", dtype, {"B": B, **shape}))
    lookup = {"N": regions * 64, "K": K, "d": d, "k": 2}
    calls.append(Call("nearest_code", "64 images, two codes", "float32", lookup))
    for dtype in ("bfloat16", "float32"):
        sizes = {"B": 64, **shape}
        calls.append(Call("deformable_sample", "64 images", dtype, sizes, BY_DEFORMABLE))
    return calls + decoder_calls(config)


def decoder_calls(config: VFMTokConfig) -> list[Call]:
    """Return the pixel decoder's norms, one per width, for 16 images; it decodes more in pieces."""
    side, calls = config.image_size, []
    for multiple in config.pixel_channel_mult:
        sizes = {"B": 16, "C": multiple * config.pixel_channels, "side": side, "groups": 32}
        calls.append(Call("group_norm_silu", f"16 maps of {side}", "bfloat16", sizes))
        side //= 2
    return calls


def generator_calls(name: str, config: GPTConfig, dtype: str = "bfloat16") -> list[Call]:
    """Return the calls of a guided decoding step for 1 and 64 images, the whole step also for 16.

    A step has four layers: all layers are alike, and kernels overlap.
    """
    C, H, V = config.dim, config.num_heads, config.vocab_size
    T, D = config.block_size, config.head_dim
    step = {"layers": 4, "C": C, "H": H, "F": config.ffn_dim, "V": V, "T": T, "position": T // 2}
    calls = []
    for B in (64, 1):
        sizes = {"B": 2 * B, "H": H, "G": H, "T": T, "D": D, "length": T // 2}
        calls.append(Call("decode_attention", f"{name} {B} guided", dtype, sizes))
        what = f"{name} {B} guided, int8 cache"
        calls.append(Call("decode_attention", what, dtype, {**sizes, "int8_cache": True}))
        for what, filters in (("", {}), (" top-k 100", {"top_k": 100}), (" top-p", {"top_p": 0.9})):
            sizes = {"B": B, "V": V, "cfg_scale": 1.5, **filters}
            calls.append(Call("sample_token", f"{B} guided{what}", "float32", sizes))
    for B in (1, 16, 64):
        sizes = {"rows": 2 * B, **step}
        calls.append(Call("decode_step", f"{name} {B} guided", dtype, sizes))
    return calls
