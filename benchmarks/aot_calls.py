"""The calls that `aot.py` compiles, at the models' shapes, and the work of each main loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vfmtok_fast.generator import GPTConfig
from vfmtok_fast.tuner.calls import BY_DEFORMABLE, Call

LEVELS = ((24, 24),) * 4
PYRAMID = ((100, 134), (50, 67), (25, 34), (13, 17))
REGIONS = {"B": 64, "Q": 256, "H": 8, "D": 64, "P": 4, "levels": LEVELS}
DETECTION = {"B": 2, "Q": 900, "H": 8, "D": 32, "P": 4, "levels": PYRAMID}


def nearest_code_calls() -> list[Call]:
    size = {"N": 65536, "K": 16384}
    every = [(f"d={d}", {**size, "d": d}) for d in (8, 12, 32)]
    every.append(("d=12 k=2", {**size, "d": 12, "k": 2}))
    return [Call("nearest_code", what, "float32", sizes) for what, sizes in every]


def deformable_sample_calls() -> list[Call]:
    return [
        Call("deformable_sample", what, dtype, sizes, BY_DEFORMABLE)
        for what, dtype, sizes in (
            ("regions", "bfloat16", REGIONS),
            ("regions", "float32", REGIONS),
            ("detection", "bfloat16", DETECTION),
            ("regions, atomics", "bfloat16", {**REGIONS, "deterministic": False}),
        )
    ]


def step_calls() -> list[Call]:
    """A step of one layer: with few rows, with more, and with rows whose products use cuBLAS."""
    calls = []
    for preset, dtype, B, options in (
        ("GPT-L", "bfloat16", 1, {}),
        ("GPT-3B", "bfloat16", 1, {}),
        ("GPT-L", "float32", 1, {}),
        ("GPT-L", "bfloat16", 16, {}),
        ("GPT-L", "bfloat16", 16, {"int8_cache": True}),
        ("GPT-B", "bfloat16", 64, {}),
    ):
        model = GPTConfig.preset(preset)
        what = " ".join([preset, f"rows={2 * B}", *options])
        sizes = {"C": model.dim, "H": model.num_heads, "F": model.ffn_dim, "V": model.vocab_size}
        sizes |= {"rows": 2 * B, "layers": 1, "T": 256, "position": 128, **options}
        calls.append(Call("decode_step", what, dtype, sizes))
    # RAR-L and RAR-XXL, whose heads are no power of two.
    for size, C, F, dtype, B in (
        ("L", 1024, 4096, "bfloat16", 1),
        ("XXL", 1408, 6144, "bfloat16", 1),
        ("XXL", 1408, 6144, "float32", 1),
        ("L", 1024, 4096, "bfloat16", 16),
        ("XXL", 1408, 6144, "bfloat16", 64),
    ):
        sizes = {"C": C, "H": 16, "F": F, "V": 16384, "rows": 2 * B, "layers": 1, "T": 264}
        sizes |= {"position": 128, "rar": True}
        calls.append(Call("decode_step", f"RAR-{size} rows={2 * B}", dtype, sizes))
    return calls


def decode_attention_calls() -> list[Call]:
    """A guided step of 64 images at length 128 of 256; one in float32; one with grouped queries."""
    names = ("B", "H", "G", "T", "D", "length")
    return [
        Call("decode_attention", what, dtype, dict(zip(names, sizes, strict=True)))
        for what, dtype, *sizes in (
            ("GPT-L", "bfloat16", 128, 16, 16, 256, 64, 128),
            ("GPT-3B", "bfloat16", 128, 32, 32, 256, 100, 128),
            ("GPT-L", "float32", 128, 16, 16, 256, 64, 128),
            ("RAR-XXL", "bfloat16", 128, 16, 16, 264, 88, 128),
            ("grouped", "bfloat16", 2, 32, 8, 256, 128, 256),
        )
    ]


def sample_token_calls() -> list[Call]:
    """132 rows are one per multiprocessor of an H200; one row is shared by several programs."""
    V, T = 16384, {"temperature": 0.9}
    K, P = {"top_k": 100}, {"top_p": 0.9}
    return [
        Call("sample_token", what, dtype, {"B": B, "V": V, "cfg_scale": 1.5, **settings})
        for what, dtype, B, settings in (
            ("plain", "float32", 132, {}),
            ("unguided", "float32", 132, {"guided": False}),
            ("plain", "bfloat16", 132, {}),
            ("shared", "float32", 1, T),
            ("shared top-k top-p", "float32", 1, {**T, **K, **P}),
            ("tempered", "float32", 132, T),
            ("greedy", "float32", 132, {"greedy": True}),
            ("top-k", "float32", 132, {**T, **K}),
            ("top-p", "float32", 132, {**T, **P}),
            ("top-k top-p", "float32", 132, {**T, **K, **P}),
            ("top-k top-p", "bfloat16", 132, {**T, **K, **P}),
        )
    ]


def decoder_calls() -> list[Call]:
    """The widest maps of the pixel decoder, with backward; a block that changes the width."""
    calls = []
    for dtype in ("bfloat16", "float32"):
        sizes = {"B": 1, "C": 128, "side": 336, "groups": 32}
        calls.append(Call("group_norm_silu", "128 channels", dtype, sizes, (0, 1, 2)))
        sizes = {"B": 1, "C": 512, "side": 42, "groups": 32}
        calls.append(Call("group_norm_silu", "512 channels", dtype, sizes, (0, 1, 2)))
    sizes = {"B": 1, "C": 256, "out": 128, "side": 42, "groups": 32}
    return [*calls, Call("residual_block", "256 to 128", "bfloat16", sizes)]


def tokenizer_calls() -> list[Call]:
    """Calls for one image: cuBLAS's part of `linear` runs here; rows do not affect registers."""
    vit, region = {"rows": 581, "C": 1024}, {"rows": 256, "C": 512}
    layer = {"rows": 581, "K": 64, "N": 4096, "activation": "gelu"}
    pixels = {"B": 1, "side": 336, "P": 14, "C": 64}
    return [
        Call("patch_embed", "ViT", "bfloat16", pixels),
        Call("add_norm", "ViT", "bfloat16", {**vit, "scaled": True}, (0, 1, 2, 3, 4)),
        Call("add_norm", "ViT", "float32", {**vit, "scaled": True}, (0, 1, 2, 3, 4)),
        Call("add_norm", "regions", "bfloat16", {**region, "scaled": False}, (0, 1, 2, 3)),
        Call("linear", "ViT", "bfloat16", layer),
        Call("linear", "ViT, trained", "bfloat16", layer, (0, 1, 2)),
        Call("linear", "ViT, trained", "float32", layer, (0, 1, 2)),
    ]


def head_calls() -> list[Call]:
    """The generator's loss with few rows: with rows held in registers, and with longer ones."""
    sizes = {"N": 64, "C": 16, "V": 16384}
    return [
        Call("linear_cross_entropy", what, dtype, {**sizes, **options}, (0, 1))
        for what, dtype, options in (
            ("plain", "bfloat16", {}),
            ("plain", "float32", {}),
            ("smoothed", "bfloat16", {"smoothing": 0.1}),
            ("rows apart", "bfloat16", {"reduction": "none"}),
            ("long rows", "bfloat16", {"V": 50304}),
        )
    ]


CALLS = [
    *nearest_code_calls(),
    *deformable_sample_calls(),
    *decoder_calls(),
    *tokenizer_calls(),
    *head_calls(),
    *step_calls(),
    *decode_attention_calls(),
    *sample_token_calls(),
]


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel: units of work in one iteration of a program, and in a whole call.

    Both are functions, of a launch's compile-time constants and of a call's sizes.
    """

    unit: str
    per_turn: Callable[[dict], float]
    units: Callable[[dict], float]
    # Floating-point operations of the matrix unit per unit of work.
    flops: Callable[[dict], float] = lambda constants: 0
    # Whether there is a loop at all, rather than a single or unrolled iteration.
    rolled: Callable[[dict], bool] = lambda constants: True


LOOPS = {
    "_screen": Loop(
        "score",
        # The loop over the tiles of a step, two per iteration.
        lambda c: 2 * c["ROWS"] * c["TILE"],
        lambda s: s["N"] * s["K"],
        lambda c: 2 * c["C"],
        # Only a call's data says how many rows the second screen sees.
        rolled=lambda c: not c["AGAIN"],
    ),
    "_decode": Loop(
        "key",
        lambda c: c["TILE"],
        # Keys of every query row; R rows share a key.
        lambda s: s["B"] * s["G"] * s["length"],
        lambda c: 4 * c["ROWS"] * c["C"] if c["ROWS"] > 1 else 0,
    ),
    "_sample_token": Loop(
        "code",
        lambda c: c["CHUNK"],
        lambda s: s["B"] * s["V"],
        # With filters, or with an unrolled draw, the draw is not the main loop.
        rolled=lambda c: not (c["BLOCK"] or c["GREEDY"] or c["SHARES"] > 1),
    ),
}
