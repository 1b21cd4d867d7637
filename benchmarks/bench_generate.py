"""`GPT.generate`, whole images with guidance, and one decoding step by op."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import harness
import pytest
import torch
from harness import DEVICE, GPU
from release_style import ReleaseStyle
from torch import Tensor, nn

import vfmtok_fast
from vfmtok_fast import GPT, GPTConfig, ops
from vfmtok_fast.generator import engine

DTYPE = torch.bfloat16 if GPU else torch.float32
SCALE = 1.5
SLOW = ("release style", "release style compiled", "reference")
OURS = ("fast", "fast, kernels apart")
# (preset, images, codes of each, providers). What matters most comes first: the time may end. The
# CPU's `make bench` has five minutes: one case is whole. A preset may end in the dtype it is
# converted to.
if GPU:
    CASES = [
        ("GPT-L", 1, 256, (*OURS, "fast, int8")),
        ("GPT-L", 64, 256, ("fast",)),
        ("GPT-B", 1, 256, OURS),
        *(("GPT-L", B, 256, ("release style", "release style compiled")) for B in (1, 64)),
        *(("GPT-L", B, 256, ("fast",)) for B in (4, 16, 128, 256, 512)),
        ("GPT-L", 16, 256, ("fast, int8",)),
        *((name, 1, 256, OURS) for name in ("GPT-XL", "GPT-XXL")),
        ("GPT-3B", 1, 256, (*OURS, "fast, int8")),
        ("GPT-L", 1, 1, ("reference", *OURS)),
        ("GPT-L", 1, 256, ("reference",)),
    ]
else:
    CASES = [
        ("GPT-B", 2, 256, ("release style", "fast")),
        ("GPT-B", 1, 16, ("uncached reference", "release style", "reference", "fast")),
        ("GPT-B", 8, 16, ("release style", "reference", "fast")),
        ("GPT-B bfloat16", 2, 16, ("reference", "fast", "fast, int8")),
    ]
RUNS = [(preset, B, count, who) for preset, B, count, every in CASES for who in every]
# What the reference generated, for the fast ways to be compared with.
REFERENCE: dict[tuple[str, int, int], Tensor] = {}


def dtype_of(preset: str) -> torch.dtype:
    return getattr(torch, preset.partition(" ")[2]) if " " in preset else DTYPE


@functools.lru_cache(maxsize=1)
def model(preset: str) -> GPT:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        gpt = GPT(GPTConfig.preset(preset.partition(" ")[0]))
    for name, parameter in gpt.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.02)
    return gpt.to(dtype_of(preset)).eval()


@functools.lru_cache(maxsize=1)
def model_int8(preset: str) -> GPT:
    return copy.deepcopy(model(preset)).quantize_weights()


class FirstCodes(Exception):
    """Ends `generate` early."""


def first_codes(gpt: GPT, class_ids: Tensor, count: int, **options) -> Tensor:
    """The first ``count`` codes: `generate` as it is, stopped from outside."""
    if count == gpt.config.block_size:
        return gpt.generate(class_ids, cfg_scale=SCALE, **options)
    codes: list[Tensor] = []
    draw = ops.sample_token

    def counted(*args, **kwargs) -> Tensor:
        codes.append(draw(*args, **kwargs))
        if len(codes) == count:
            raise FirstCodes
        return codes[-1]

    ops.sample_token = counted
    try:
        gpt.generate(class_ids, cfg_scale=SCALE, **options)
    except FirstCodes:
        pass
    finally:
        ops.sample_token = draw
    return torch.stack(codes, dim=1)


def fast(
    preset: str, class_ids: Tensor, count: int, apart: bool = False, int8: bool = False
) -> Tensor:
    gpt = (model_int8 if int8 else model)(preset)
    with vfmtok_fast.enable():
        if not GPU:
            return first_codes(gpt, class_ids, count)
        from vfmtok_fast.kernels import launch

        overlap = False if apart else None
        if launch.OVERLAP != overlap:
            launch.OVERLAP = overlap
            engine.forget()  # Its graphs are of the other setting.
        return first_codes(gpt, class_ids, count)


@functools.lru_cache(maxsize=1)
def release_style(preset: str, rows: int, compiled: bool) -> ReleaseStyle:
    return ReleaseStyle(model(preset), rows, compiled)


def released(preset: str, class_ids: Tensor, count: int, compiled: bool = False) -> Tensor:
    style = release_style(preset, 2 * len(class_ids), compiled)
    return style.generate(class_ids, SCALE, count)


PROVIDERS: dict[str, Callable[[str, Tensor, int], Tensor]] = {
    "uncached reference": lambda preset, *rest: first_codes(model(preset), *rest, use_cache=False),
    "release style": released,
    "release style compiled": functools.partial(released, compiled=True),
    "reference": lambda preset, *rest: first_codes(model(preset), *rest),
    "fast": fast,
    "fast, kernels apart": functools.partial(fast, apart=True),
    "fast, int8": functools.partial(fast, int8=True),
}


def step_work(gpt: GPT, rows: int, count: int, int8: bool) -> harness.Work:
    """Weights once a step, and the live keys and values."""
    config, size = gpt.config, gpt.dtype.itemsize
    layer = 4 * config.dim**2 + 3 * config.dim * config.ffn_dim
    weights = config.num_layers * layer + config.dim * config.vocab_size
    live = rows * config.num_layers * 2 * config.dim * count * (count + 1) // 2
    return harness.Work(
        bytes=count * weights * (1 if int8 else size) + size * live,
        flops=2 * count * rows * weights + 2 * live,
    )


@pytest.mark.parametrize(("preset", "B", "count", "provider"), RUNS)
def bench_generate(benchmark, preset: str, B: int, count: int, provider: str):
    if provider == "fast, kernels apart" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("programmatic dependent launch needs sm_90")
    gpt = model(preset)
    class_ids = torch.arange(B, device=DEVICE) % gpt.config.num_classes

    def check(codes: Tensor) -> dict[str, object]:
        assert codes.shape == (B, count) and 0 <= int(codes.min())
        assert int(codes.max()) < gpt.config.vocab_size
        facts: dict[str, object] = {"images": B, "codes": count, "cfg_scale": SCALE}
        if provider == "reference":
            REFERENCE[preset, B, count] = codes
        if "fast" in provider and (want := REFERENCE.get((preset, B, count))) is not None:
            same = float((codes == want).float().mean())
            # In float32 a tie within rounding is rare; after one the images differ.
            assert same == 1 or gpt.dtype != torch.float32 or "int8" in provider, same
            facts["codes_as_reference"] = round(same, 4)
        return facts

    harness.measure(
        benchmark,
        op="generate",
        shape=f"{preset} B={B} guided, {count} codes",
        provider=provider,
        fn=lambda: PROVIDERS[provider](preset, class_ids, count),
        check=check,
        work=step_work(gpt, 2 * B, count, "int8" in provider),
        # Of a slow one on a GPU each takes 4 s, and there are three calls besides.
        rounds=5 if GPU and provider not in SLOW else 2,
        replay=False,
        slow=not GPU,
    )


def step_ops(gpt: GPT, rows: int, length: int) -> dict[str, Callable[[], object]]:
    """The ops of one decoding step, each for all layers, on the model's own weights."""
    config = gpt.config
    draw = torch.Generator(device=DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=DEVICE).to(DTYPE)

    x, hidden, logits = (normal(rows, n) for n in (config.dim, config.ffn_dim, config.vocab_size))
    q = normal(rows, config.num_heads, config.head_dim)
    caches = [
        [normal(rows, config.num_heads, config.block_size, config.head_dim) for _ in range(2)]
        for _ in gpt.blocks
    ]
    layers = list(zip(gpt.blocks, caches, strict=True))
    half = rows // 2
    ids = torch.arange(half, device=DEVICE)
    codes = torch.zeros(half, config.block_size, dtype=torch.int64, device=DEVICE)
    return {
        "qkv_rotary": lambda: [
            ops.qkv_rotary(
                x, b.attention_norm.weight, b.attention.qkv.weight, gpt.rotary, *c, length
            )
            for b, c in layers
        ],
        "decode_attention": lambda: [ops.decode_attention(q, *c, length + 1) for _, c in layers],
        "linear_residual (out)": lambda: [
            ops.linear_residual(x, b.attention.out.weight, x) for b, _ in layers
        ],
        "gate_up": lambda: [
            ops.gate_up(x, b.ffn_norm.weight, b.ffn.gate.weight, b.ffn.up.weight) for b, _ in layers
        ],
        "linear_residual (down)": lambda: [
            ops.linear_residual(hidden, b.ffn.down.weight, x) for b, _ in layers
        ],
        "norm_linear": lambda: ops.norm_linear(x, gpt.norm.weight, gpt.head.weight),
        "sample_token": lambda: ops.sample_token(
            logits[:half].float(), ids, length, uncond_logits=logits[half:].float(), cfg_scale=SCALE
        ),
        "append_code": lambda: ops.append_code(ids, codes, length, gpt.token_embedding.weight, x),
    }


STEP = (
    "qkv_rotary", "decode_attention", "linear_residual (out)", "gate_up", "linear_residual (down)",
    "norm_linear", "sample_token", "append_code",
)  # fmt: skip


@pytest.mark.parametrize("provider", ["reference", "fast"])
@pytest.mark.parametrize("part", STEP)
def bench_step(benchmark, part: str, provider: str):
    """Where the time of a step goes: GPT-B at half its length, guided; 2 images, a GPU's 1."""
    rows, length = (2 if GPU else 4), 128
    gpt = model("GPT-B")
    run = step_ops(gpt, rows, length)[part]
    handle = vfmtok_fast.enable() if provider == "fast" else None
    try:
        with torch.no_grad():
            harness.measure(
                benchmark,
                op="generate_step",
                shape=f"GPT-B {rows} rows, position {length}: {part}, all layers",
                provider=provider,
                fn=run,
                check=lambda out: {},
                work=part_work(gpt, part, rows, length),
            )
    finally:
        if handle:
            handle.close()


def part_work(gpt: GPT, part: str, rows: int, length: int) -> harness.Work:
    config = gpt.config
    dim, ffn, layers = config.dim, config.ffn_dim, config.num_layers
    numbers = {
        "qkv_rotary": layers * 3 * dim * dim,
        "decode_attention": layers * rows * 2 * dim * length,
        "linear_residual (out)": layers * dim * dim,
        "gate_up": layers * 2 * dim * ffn,
        "linear_residual (down)": layers * dim * ffn,
        "norm_linear": dim * config.vocab_size,
        "sample_token": rows * config.vocab_size,
        "append_code": 2 * rows * dim,
    }[part]
    each = 1 if part in ("decode_attention", "sample_token", "append_code") else rows
    return harness.Work(bytes=DTYPE.itemsize * numbers, flops=2 * each * numbers)
