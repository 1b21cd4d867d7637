"""What `aot.py` compiles: calls at the models' shapes; and what a turn of a kernel's loop does."""

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
    """The layers of a decoding step; those of many rows are the kernels beside cuBLAS."""
    calls = []
    for preset, dtype, rows, int8 in (
        ("GPT-L", "bfloat16", 2, False),
        ("GPT-3B", "bfloat16", 2, False),
        ("GPT-L", "bfloat16", 32, False),
        ("GPT-L", "float32", 2, False),
        ("GPT-3B", "bfloat16", 2, True),
        ("GPT-L", "bfloat16", 32, True),
        ("GPT-B", "bfloat16", 33, False),
    ):
        model = GPTConfig.preset(preset)
        C, F, V, H = model.dim, model.ffn_dim, model.vocab_size, model.num_heads
        what = f"{preset} rows={rows}{' int8' * int8}"
        many = rows > 32
        sizes = [
            ("qkv_rotary", {"K": C, "H": H, "T": 256}),
            ("gate_up", {"K": C, "N": F}),
            # Of many rows these launch nothing that the others do not.
            *([] if many else [("linear_residual", {"K": F, "N": C})]),
            *([] if many else [("norm_linear", {"K": C, "N": V})]),
        ]
        for op, shape in sizes:
            calls.append(Call(op, what, dtype, {"rows": rows, **shape, "int8": int8}))
    for dtype, C in (("bfloat16", 1024), ("float32", 3200)):
        sizes = {"B": 1, "T": 256, "V": 16384, "C": C}
        calls.append(Call("append_code", f"C={C}", dtype, sizes))
    return calls


def decode_attention_calls() -> list[Call]:
    """A guided step of 64 images at length 128 of 256; one in float32; one with split keys."""
    names = ("B", "H", "G", "T", "D", "length")
    return [
        Call("decode_attention", what, dtype, dict(zip(names, sizes, strict=True)))
        for what, dtype, *sizes in (
            ("GPT-L", "bfloat16", 128, 16, 16, 256, 64, 128),
            ("GPT-3B", "bfloat16", 128, 32, 32, 256, 100, 128),
            ("GPT-L", "float32", 128, 16, 16, 256, 64, 128),
            ("grouped", "bfloat16", 2, 32, 8, 32768, 128, 32768),
        )
    ]


def sample_token_calls() -> list[Call]:
    """132 rows are one for every multiprocessor of an H200; one row is shared."""
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


CALLS = [
    *nearest_code_calls(),
    *deformable_sample_calls(),
    *step_calls(),
    *decode_attention_calls(),
    *sample_token_calls(),
]


@dataclass(frozen=True)
class Loop:
    """The main loop of a kernel: what one turn of a program does, and what a call has of it.

    Functions of a launch's compile-time constants, and of a call's sizes.
    """

    unit: str
    per_turn: Callable[[dict], float]
    units: Callable[[dict], float]
    # Floating-point operations of the matrix unit for one unit.
    flops: Callable[[dict], float] = lambda constants: 0
    # Whether there is a loop, not one turn or an unrolled one.
    rolled: Callable[[dict], bool] = lambda constants: True


def _weights(pair: bool, units: Callable[[dict], float]) -> Loop:
    each = 2 if pair else 1
    return Loop(
        "weight",
        lambda c: each * 16 * 4 * c["DEPTH"],
        units,
        lambda c: 2 * c["P"],
        lambda c: c["K"] >= 32 * c["DEPTH"],
    )


LOOPS = {
    "_screen": Loop(
        "score",
        # The loop over the tiles of a step, two a turn.
        lambda c: 2 * c["ROWS"] * c["TILE"],
        lambda s: s["N"] * s["K"],
        lambda c: 2 * c["C"] * (3 if c["AGAIN"] else 1),
    ),
    "_qkv_rotary": _weights(True, lambda s: 3 * s["K"] ** 2),
    "_gate_up": _weights(True, lambda s: 2 * s["K"] * s["N"]),
    "_linear_residual": _weights(False, lambda s: s["K"] * s["N"]),
    "_norm_linear": _weights(False, lambda s: s["K"] * s["N"]),
    "_decode": Loop(
        "key",
        lambda c: c["TILE"],
        # Of every query row; R of them share a key.
        lambda s: s["B"] * s["G"] * s["length"],
        lambda c: 4 * c["ROWS"] * c["C"] if c["ROWS"] > 1 else 0,
    ),
    "_sample_token": Loop(
        "code",
        lambda c: c["CHUNK"],
        lambda s: s["B"] * s["V"],
        # Where there are filters, and where the draw is unrolled, the draw is not the main loop.
        rolled=lambda c: not (c["BLOCK"] or c["GREEDY"] or c["SHARES"] > 1),
    ),
}
