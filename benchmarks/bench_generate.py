"""`GPT.generate` for whole images with guidance, and one decoding step by op."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import harness
import pytest
import torch
from harness import DEVICE, GPU
from release_style import ReleaseStyle
from torch import Tensor, nn

import vfmtok_fast
from vfmtok_fast import GPT, GPTConfig, ops, switch
from vfmtok_fast.generator import Decoder, Sampling

DTYPE = torch.bfloat16 if GPU else torch.float32
SCALE = 1.5
SLOW = ("release style", "release style compiled", "reference")
OURS = ("fast", "fast, kernels apart")
# (preset, images, codes per image, providers). The most important cases come first, since time may
# run out. `make bench` on a CPU has five minutes, so only one case generates whole images. A preset
# may end in the dtype to which it is converted.
if GPU:
    CASES = [
        *(("GPT-L", B, 256, ("fast", "fast, int8 cache")) for B in (64, 256)),
        ("GPT-L", 1, 256, OURS),
        *(("GPT-L", 1, 256, (style,)) for style in ("release style", "release style compiled")),
        ("GPT-B", 1, 256, OURS),
        ("GPT-3B", 1, 256, OURS),
        *(("GPT-L", 64, 256, (style,)) for style in ("release style", "release style compiled")),
        *(("GPT-L", B, 256, ("fast",)) for B in (4, 16, 128, 512)),
        *((name, 1, 256, OURS) for name in ("GPT-XL", "GPT-XXL")),
        ("GPT-L", 1, 1, ("reference", *OURS)),
        ("GPT-L", 1, 256, ("reference",)),
    ]
else:
    CASES = [
        ("GPT-B", 2, 256, ("release style", "fast")),
        ("GPT-B", 1, 16, ("uncached reference", "release style", "reference", "fast")),
        ("GPT-B", 8, 16, ("release style", "reference", "fast")),
        ("GPT-B bfloat16", 2, 16, ("reference", "fast")),
    ]
RUNS = [(preset, B, count, who) for preset, B, count, every in CASES for who in every]
# Codes of the reference, with which the fast paths are compared.
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
def decoder(preset: str, images: int, kv_dtype: torch.dtype | None) -> Decoder:
    return model(preset).decoder(images, guided=True, kv_dtype=kv_dtype)


class Enough(Exception):
    """Ends a generation early."""


def first_codes(
    preset: str, class_ids: Tensor, count: int, kv_dtype: torch.dtype | None = None
) -> Tensor:
    """Return the first ``count`` codes of a normal generation that is stopped from outside."""
    made = decoder(preset, len(class_ids), kv_dtype)

    def stop(done: int, total: int) -> None:
        if done == count * len(class_ids) < total:
            raise Enough

    with contextlib.suppress(Enough):
        made.generate(class_ids, cfg_scale=SCALE, progress=stop)
    return made.codes[:, :count].clone()


def fast(
    preset: str, class_ids: Tensor, count: int, apart: bool = False,
    kv_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    with vfmtok_fast.enable():
        if GPU:
            set_overlap(False if apart else None)
        return first_codes(preset, class_ids, count, kv_dtype)


def set_overlap(overlap: bool | None) -> None:
    """Let kernels begin before the last one ends, where it wins (None) or never (False)."""
    from vfmtok_fast.kernels import launch

    if launch.OVERLAP != overlap:
        launch.OVERLAP = overlap
        switch.new_generation()  # The captured graphs have the other setting.


@functools.lru_cache(maxsize=1)
def release_style(preset: str, rows: int, compiled: bool) -> ReleaseStyle:
    return ReleaseStyle(model(preset), rows, compiled)


def released(preset: str, class_ids: Tensor, count: int, compiled: bool = False) -> Tensor:
    style = release_style(preset, 2 * len(class_ids), compiled)
    return style.generate(class_ids, SCALE, count)


@torch.no_grad()
def uncached(preset: str, class_ids: Tensor, count: int) -> Tensor:
    """Recompute every position at every step."""
    gpt, sampling, ids = model(preset), Sampling(cfg_scale=SCALE), torch.arange(len(class_ids))
    classes = torch.cat([class_ids, torch.full_like(class_ids, gpt.config.num_classes)])
    codes = class_ids.new_empty(len(class_ids), 0)
    for step in range(count):
        logits = gpt.predict(gpt.embed(classes, codes.repeat(2, 1)))[:, -1]
        code = sampling.draw(logits, ids.to(DEVICE), step)
        codes = torch.cat([codes, code[:, None]], dim=1)
    return codes


PROVIDERS: dict[str, Callable[[str, Tensor, int], Tensor]] = {
    "uncached reference": uncached,
    "release style": released,
    "release style compiled": functools.partial(released, compiled=True),
    "reference": first_codes,
    "fast": fast,
    "fast, kernels apart": functools.partial(fast, apart=True),
    "fast, int8 cache": functools.partial(fast, kv_dtype=torch.int8),
}


def step_work(gpt: GPT, rows: int, count: int, int8_cache: bool) -> harness.Work:
    """Weights once per step, and the live keys and values."""
    config, size = gpt.config, gpt.dtype.itemsize
    layer = 4 * config.dim**2 + 3 * config.dim * config.ffn_dim
    weights = config.num_layers * layer + config.dim * config.vocab_size
    live = rows * config.num_layers * 2 * config.dim * count * (count + 1) // 2
    return harness.Work(
        bytes=size * count * weights + (1 if int8_cache else size) * live,
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
            # In float32 ties within rounding are rare; after one, the images differ.
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
        # A round of a slow provider takes 4 s on a GPU, and there are three more calls.
        rounds=5 if GPU and provider not in SLOW else 2,
        replay=False,
        slow=not GPU,
    )


def step_ops(gpt: GPT, rows: int, position: int) -> dict[str, Callable[[], object]]:
    """The ops of one position, with the model's own weights; attention for all layers."""
    config, half = gpt.config, rows // 2
    draw = torch.Generator(device=DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=DEVICE).to(DTYPE)

    logits, q = normal(rows, config.vocab_size), normal(rows, config.num_heads, config.head_dim)
    cache = gpt.decoder(half, guided=True).cache
    for layer in cache:
        for part in layer[:2]:
            part.normal_(generator=draw)
    ids = torch.arange(half, device=DEVICE)
    weights, embedding = gpt.step_weights(), gpt.token_embedding.weight
    return {
        "decode_step": lambda: ops.decode_step(ids.repeat(2), embedding, weights, cache, position),
        "decode_attention": lambda: [
            ops.decode_attention(q, layer.keys, layer.values, position + 1) for layer in cache
        ],
        "sample_token": lambda: ops.sample_token(
            logits[:half].float(), ids, position, uncond_logits=logits[half:].float(),
            cfg_scale=SCALE,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("provider", ["reference", "fast"])
@pytest.mark.parametrize("part", ["decode_step", "decode_attention", "sample_token"])
def bench_step(benchmark, part: str, provider: str):
    """Time of a step by op: GPT-B at half its length, guided; 2 images on a CPU, 1 on a GPU."""
    rows, position = (2 if GPU else 4), 128
    if GPU:
        set_overlap(None)  # The last generation may have had another setting.
    gpt = model("GPT-B")
    handle = vfmtok_fast.enable() if provider == "fast" else None
    try:
        with torch.no_grad():
            harness.measure(
                benchmark,
                op="generate_step",
                shape=f"GPT-B {rows} rows, position {position}: {part}",
                provider=provider,
                fn=step_ops(gpt, rows, position)[part],
                check=lambda out: {},
                work=part_work(gpt, part, rows, position),
            )
    finally:
        if handle:
            handle.close()


def part_work(gpt: GPT, part: str, rows: int, position: int) -> harness.Work:
    config = gpt.config
    layer = 4 * config.dim**2 + 3 * config.dim * config.ffn_dim
    weights = config.num_layers * layer + config.dim * config.vocab_size
    live = config.num_layers * rows * 2 * config.dim * position
    numbers = {
        "decode_step": weights + live,
        "decode_attention": live,
        "sample_token": rows * config.vocab_size,
    }[part]
    flops = 2 * rows * weights + 2 * live if part == "decode_step" else 2 * numbers
    return harness.Work(bytes=DTYPE.itemsize * numbers, flops=flops)
