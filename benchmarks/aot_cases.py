"""What `aot.py` compiles: every kernel, at the shapes of the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from vfmtok_fast.kernels import (
    append_code,
    decode_attention,
    few_rows,
    gate_up,
    linear_residual,
    nearest_code,
    norm_linear,
    qkv_rotary,
    sample_token,
)


@dataclass(frozen=True)
class Case:
    """One kernel as one call would compile it; arguments of neither kind are an error."""

    name: str
    kernel: object
    # Triton types of the run-time arguments; pointers count as aligned to 16 bytes.
    types: dict[str, str | tuple[str, ...]]
    constants: dict[str, object]
    warps: int
    stages: int = 3
    # Further compiler options of the launch.
    options: dict[str, int] = field(default_factory=dict, compare=False)
    # The unit of the main loop: how many one warp does in one turn, how many there are in the
    # named problem, and the matrix operations of one. 0 where there is no such loop.
    unit: str = ""
    units_per_warp: int = 0
    units: int = 0
    matrix_flops: int = 0
    problem: str = field(default="", compare=False)
    # Numbers that a launch finds to be multiples of 16: strides, which widen the loads.
    aligned: tuple[str, ...] = ()
    # Compute capabilities whose launches take these constants.
    chips: tuple[int, ...] = (80, 90, 100)


def _pointers(kinds: str, **names: str) -> dict[str, str]:
    return {name: f"*{kind}" for name, kind in names.items()} | dict.fromkeys(kinds.split(), "i32")


def nearest_code_cases() -> list[Case]:
    n, k = 65536, 16384
    cases = []
    for d in (8, 12, 32):
        columns, rows = max(16, d), nearest_code.SCREEN_ROWS
        screen = _pointers(
            "N tiles splits",
            z="fp32", packed="fp16", facts="i64", best="fp32", chunk="i32", second="fp32",
            slack="fp32",
        )  # fmt: skip
        screen["bound"] = "fp32"
        cases.append(
            Case(
                f"nearest_code._screen d={d}",
                nearest_code._screen,
                screen,
                {"D": d, "C": columns, "ROWS": rows},
                nearest_code.SCREEN_WARPS,
                nearest_code.SCREEN_STAGES,
                unit="score",
                units_per_warp=rows * nearest_code.TILE.value // nearest_code.SCREEN_WARPS,
                units=n * k,
                matrix_flops=2 * columns,
                problem=f"N={n} K={k} d={d}",
            )
        )
    d, columns, splits = 12, 16, 4
    cases += [
        Case(
            f"nearest_code._prepare d={d}",
            nearest_code._prepare,
            _pointers(
                "K", codebook="fp32", packed="fp16", exact="fp32", inverse="fp64", facts="i64"
            ),
            {"D": d, "C": columns},
            1,
        ),
        Case(
            f"nearest_code._rescan d={d}",
            nearest_code._rescan,
            _pointers(
                "N K",
                z="fp32", exact="fp32", inverse="fp64", facts="i64", best="fp32", chunk="i32",
                second="fp32", slack="fp32", listed="i64", code="i64", score="fp32",
            ),
            {"SLOTS": 4, "D": d, "C": columns, "ROWS": nearest_code.RESCAN_ROWS},
            4,
        ),
        Case(
            f"nearest_code._resolve d={d}",
            nearest_code._resolve,
            _pointers(
                "K chunks",
                z="fp32", exact="fp32", inverse="fp64", facts="i64", listed="i64",
                part_score="fp64", part_code="i32",
            ),
            {"SPLITS": splits, "D": d},
            4,
        ),
        Case(
            f"nearest_code._merge d={d}",
            nearest_code._merge,
            _pointers(
                "",
                z="fp32", facts="i64", listed="i64", part_score="fp64", part_code="i32",
                code="i64", score="fp32",
            ),
            {"SPLITS": splits, "D": d, "C": columns},
            1,
        ),
    ]  # fmt: skip
    return cases


def step_cases() -> list[Case]:
    """The layers of GPT-L's and GPT-3B's decoding step; loops only where they are rolled.

    "int8" is of bfloat16 rows.
    """
    cases = []
    tile, slices = few_rows.TILE.value, few_rows.SLICES.value
    for preset, kind, rows, (heads, dim, ffn) in (
        ("GPT-L", "bf16", 2, (16, 1024, 2816)),
        ("GPT-3B", "bf16", 2, (32, 3200, 8704)),
        ("GPT-L", "bf16", 32, (16, 1024, 2816)),
        ("GPT-L", "fp32", 2, (16, 1024, 2816)),
        ("GPT-3B", "int8", 2, (32, 3200, 8704)),
        ("GPT-L", "int8", 32, (16, 1024, 2816)),
    ):
        value = torch.float32 if kind == "fp32" else torch.bfloat16
        stored = torch.int8 if kind == "int8" else value
        shape = {"H": heads, "T": 256, "D": dim // heads, "ON_DEVICE": True}
        for kernel, K, N, extra in (
            (qkv_rotary._qkv_rotary, dim, 3 * dim // 2, shape),
            (linear_residual._linear_residual, ffn, dim, {}),
            (gate_up._gate_up, dim, ffn, {}),
            (norm_linear._norm_linear, dim, 16384, {}),
        ):
            pair = kernel in (qkv_rotary._qkv_rotary, gate_up._gate_up)
            x, weight = torch.empty(rows, K, dtype=value), torch.empty(1, K, dtype=stored)
            constants = few_rows.constants(x, weight, pair=pair) | extra
            warps, options = constants.pop("num_warps"), {"maxnreg": constants.pop("maxnreg")}
            types: dict[str, str | tuple[str, ...]] = {
                name: "*fp32" if value == torch.float32 else "*bf16"
                for name in kernel.arg_names
                if name not in constants
            }
            scales = [name for name in types if "scale" in name]
            if kind == "int8":
                types |= dict.fromkeys(scales, "*fp32")
                types |= dict.fromkeys({"weight", "gate", "up"} & set(types), "*i8")
            else:
                types = {name: type_ for name, type_ in types.items() if name not in scales}
                constants |= dict.fromkeys(scales)
            types |= {name: "i32" for name in ("rows", "N") if name in types}
            types |= {name: "fp32" for name in ("eps",) if name in types}
            types |= {"rotary": "*fp32", "position": "*i64"} if extra else {}
            types |= {"out": "*fp32"} if kernel is norm_linear._norm_linear else {}
            rolled = K >= 8 * slices * constants["DEPTH"]
            cases.append(
                Case(
                    f"{kernel.__name__.removeprefix('_')}.{kernel.__name__} {preset} {kind} "
                    f"rows={rows}",
                    kernel,
                    types,
                    constants,
                    warps,
                    constants["STAGES"],
                    options,
                    unit="weight" if rolled else "",
                    units_per_warp=(2 if pair else 1) * tile * constants["DEPTH"],
                    units=(2 if pair else 1) * N * K,
                    # A float32 product is not the matrix unit's.
                    matrix_flops=2 * constants["P"] if value != torch.float32 else 0,
                    problem=f"{preset} rows={rows} K={K} N={N} {kind}",
                )
            )
    cases += [
        Case(
            "few_rows._rms_norm GPT-L bf16",
            few_rows._rms_norm,
            {"x": "*bf16", "norm": "*bf16", "out": "*bf16", "rows": "i32", "eps": "fp32"},
            {"K": 1024, "WIDTH": 1024},
            4,
        ),
        Case(
            "gate_up._gate bf16",
            gate_up._gate,
            {"gate": "*bf16", "up": "*bf16", "out": "*bf16", "count": "i32"},
            {"BLOCK": gate_up.BLOCK},
            4,
        ),
    ]
    kernel = qkv_rotary._rotary
    cases.append(
        Case(
            "qkv_rotary._rotary GPT-L bf16",
            kernel,
            {"qkv": "*bf16", "rotary": "*fp32", "position": "*i64", "out": "*bf16",
             "k_cache": "*bf16", "v_cache": "*bf16", "rows": "i32"},
            {"H": 16, "T": 256, "D": 64, "ON_DEVICE": True,
             "ROWS": qkv_rotary.ROWS, "PAIRS": qkv_rotary.PAIRS},
            4,
        )
    )  # fmt: skip
    cases += [
        Case(
            f"append_code._append_code {kind} C={C}",
            append_code._append_code,
            {"code": "*i64", "codes": "*i64", "position": "*i64", "number": "i32",
             "embedding": f"*{kind}", "x": f"*{kind}", "B": "i32", "T": "i32"},
            {"COUNTERS": 2, "C": C, "WIDTH": WIDTH, "CODES": append_code.CODES, "OVERLAP": False},
            4,
        )
        for kind, C, WIDTH in (("bf16", 1024, 1024), ("fp32", 3200, 4096))
    ]  # fmt: skip
    return cases


def decode_attention_cases() -> list[Case]:
    """A guided step of 64 images at length 128 of 256; one more with split keys; one in float32."""
    module = decode_attention
    cases = []
    for what, kind, B, H, G, T, D, live in (
        ("GPT-L", "bf16", 128, 16, 16, 256, 64, 128),
        ("GPT-3B", "bf16", 128, 32, 32, 256, 100, 128),
        ("GPT-L", "fp32", 128, 16, 16, 256, 64, 128),
        ("grouped", "bf16", 2, 32, 8, 32768, 128, 32768),
    ):
        itemsize = 4 if kind == "fp32" else 2
        constants = module._constants(H // G, D, itemsize)
        programs = B * H // constants["R"]
        splits = module._splits(programs, 2 * T * D * itemsize)
        types = dict.fromkeys(("q", "keys", "values", "out"), f"*{kind}") | {"length": "*i64"}
        types |= {"parts": "*fp32", "arrived": "*i32"} if splits > 1 else {}
        strides = ("k_batch", "k_head", "v_batch", "v_head")
        types |= dict.fromkeys(("heads", "capacity", *strides), "i32")
        unused = {} if splits > 1 else {"parts": None, "arrived": None}
        cases.append(
            Case(
                f"decode_attention._decode {kind} {what} D={D} splits={splits}",
                module._decode,
                types,
                {
                    **constants,
                    **unused,
                    "LENGTHS": 1,
                    "K_ROW": D,
                    "V_ROW": D,
                    "SPLITS": splits,
                    "STAGES": module.STAGES,
                    "OVERLAP": False,
                },  # fmt: skip
                module.WARPS,
                unit="key",
                units_per_warp=constants["TILE"] // module.WARPS,
                units=programs * live,
                # Queries are padded; both products.
                matrix_flops=4 * constants["ROWS"] * constants["C"] if itemsize == 2 else 0,
                problem=f"B={B} H={H} G={G} T={T} D={D} length={live} {kind}",
                aligned=("heads", "capacity", *strides),
            )
        )
    return cases


def sample_token_cases() -> list[Case]:
    # One row for every multiprocessor of an H200; and as for one image, whose row is shared.
    B, V, module = 132, 16384, sample_token
    cases = []
    for name, kind, guided, tempered, top_k, top_p, greedy in (
        ("plain", "fp32", True, False, False, False, False),
        ("unguided", "fp32", False, False, False, False, False),
        ("plain", "bf16", True, False, False, False, False),
        ("shared", "fp32", True, True, False, False, False),
        ("shared top-k,top-p", "fp32", True, True, True, True, False),
        ("tempered", "fp32", True, True, False, False, False),
        ("greedy", "fp32", True, False, False, False, True),
        ("top-k", "fp32", True, True, True, False, False),
        ("top-p", "fp32", True, True, False, True, False),
        ("top-k,top-p", "fp32", True, True, True, True, False),
        ("top-k,top-p", "bf16", True, True, True, True, False),
    ):
        types = dict.fromkeys(("stride", "seed_low", "seed_high"), "i32")
        types |= {"logits": f"*{kind}"} | dict.fromkeys(("image_ids", "step", "out"), "*i64")
        if guided:
            types |= {"uncond": f"*{kind}", "uncond_stride": "i32", "cfg_scale": "fp32"}
        optional = {"temperature": (tempered, "fp32"), "top_k": (top_k, "i32")}
        optional["top_p"] = top_p, "fp32"
        types |= {argument: type_ for argument, (there, type_) in optional.items() if there}
        shares = module.MAX_SHARES if "shared" in name else 1
        constants = {"V": V, "BLOCK": V * (top_k or top_p), "SHARES": shares}
        constants |= {"CHUNK": min(module.CHUNK, V // shares), "GREEDY": greedy, "OVERLAP": False}
        kernel = module._sample_token
        constants |= dict.fromkeys(set(kernel.arg_names) - set(types) - set(constants))
        # Where there are filters, and where the draw is unrolled, the draw is not the main loop.
        drawn = not (top_k or top_p or greedy or shares > 1)
        cases.append(
            Case(
                f"sample_token._sample_token {name} {kind}",
                kernel,
                types,
                constants,
                module.CHUNK // module.CODES_PER_WARP,
                options={
                    "enable_fp_fusion": False,
                    **(module.GREEDY_OPTIONS if greedy else {}),
                },
                unit="code" if drawn else "",
                units_per_warp=module.CODES_PER_WARP,
                units=B * V,
                problem=f"B={B} V={V} {name} {kind}",
                aligned=("stride", "uncond_stride"),
            )
        )
    shares = {"shares": "*i64", "out": "*i64", "rows": "i32"}
    constants = {"SHARES": module.MAX_SHARES, "ROWS": module.BEST_ROWS, "OVERLAP": False}
    cases.append(Case("sample_token._best_share", module._best_share, shares, constants, 1))
    return cases


def as_launched(case: Case) -> list[Case]:
    """A case on the chips of its launch: where kernels can overlap, they do."""
    if "OVERLAP" not in case.constants:
        return [case]
    overlapping = dataclasses.replace(
        case,
        constants={**case.constants, "OVERLAP": True},
        options={**case.options, "launch_pdl": True},
        chips=tuple(chip for chip in case.chips if chip >= 90),
    )
    apart = dataclasses.replace(case, chips=tuple(chip for chip in case.chips if chip < 90))
    return [overlapping, apart]


CASES = [
    *nearest_code_cases(),
    *(
        launched
        for case in (*step_cases(), *decode_attention_cases(), *sample_token_cases())
        for launched in as_launched(case)
    ),
]
