"""From files to tokens and from classes to images, at full size with random weights.

"photos to cache" is a whole `cache.build`: JPEGs are read, decoded, cut and encoded, and shards are
written and committed. "classes to pictures" is `GPT.generate` with guidance, then
`VFMTok.decode_to_uint8`. Both run with nothing enabled and with everything enabled.
"""

from __future__ import annotations

import functools
import shutil

import harness
import numpy as np
import pytest
import torch
from bench_cache import photos
from bench_generate import step_work
from bench_tokenizer import flops
from harness import DEVICE, GPU
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import GPT, GPTConfig, VFMTok, cache
from vfmtok_fast.untrained import untrained_tokenizer

PRECISION = "bfloat16" if GPU else "float32"
PHOTOS, BATCH = (512, 64) if GPU else (2, 2)
PRESET, CLASSES = ("GPT-L", 64) if GPU else ("GPT-B", 1)
SCALE = 1.5
PROVIDERS = ("reference", "fast")
# Results of the reference, with which the fast ones are compared.
REFERENCE: dict[str, np.ndarray] = {}


@functools.cache
def tokenizer() -> VFMTok:
    return untrained_tokenizer("full").to(DEVICE).set_precision(PRECISION)


@functools.cache
def generator() -> GPT:
    torch.manual_seed(0)
    gpt = GPT(GPTConfig.preset(PRESET)).eval()
    torch.nn.init.normal_(gpt.head.weight, std=0.02)
    return gpt.to(DEVICE, getattr(torch, PRECISION))


def as_reference(what: str, provider: str, codes: np.ndarray) -> dict[str, object]:
    """Return the share of codes equal to the reference's; in float32, only near ties may differ."""
    if provider == "reference":
        REFERENCE[what] = codes
    want = REFERENCE.get(what)
    if want is None:
        return {}
    same = float((codes == want).mean())
    assert PRECISION != "float32" or same >= 0.999, f"{same:.4f} of the codes are the reference's"
    return {"codes_as_reference": round(same, 4)}


def measure(benchmark, count: int, work: harness.Work, **options) -> None:
    policy = vfmtok_fast.enable(None if options["provider"] == "fast" else [])
    with policy:
        harness.measure(
            benchmark, op="end_to_end", work=work, rounds=3 if GPU else 2, replay=False,
            slow=not GPU, **options,
        )  # fmt: skip
    record = harness.session.records[-1]
    record["images_s"] = round(1e6 * count / record["median_us"], 2)


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_photos_to_cache(benchmark, provider: str):
    folder, tok = photos(PHOTOS), tokenizer()
    out = folder.parent / "end-to-end"

    def build() -> np.ndarray:
        shutil.rmtree(out, ignore_errors=True)
        done = cache.build(folder, out, tok, views=["center"], batch_size=BATCH)
        assert done.encoded == PHOTOS
        with_tokens = cache.TokenCache(out, view="center")
        return np.stack([np.asarray(with_tokens[i][0]) for i in range(PHOTOS)])

    def check(codes: np.ndarray) -> dict[str, object]:
        assert codes.shape == (PHOTOS, 256)
        return {"images": PHOTOS, **as_reference("photos", provider, codes)}

    size = sum(path.stat().st_size for path in folder.rglob("*.jpg"))
    measure(
        benchmark, PHOTOS, harness.Work(bytes=size, flops=PHOTOS * flops()["encode"]),
        provider=provider, shape=f"photos to cache, {PHOTOS} photos {PRECISION}", fn=build,
        check=check,
    )  # fmt: skip


@pytest.mark.parametrize("provider", PROVIDERS)
def bench_classes_to_pictures(benchmark, provider: str):
    gpt, tok = generator(), tokenizer()
    class_ids = torch.arange(CLASSES, device=DEVICE)

    def pictures() -> tuple[Tensor, Tensor]:
        codes = gpt.generate(class_ids, cfg_scale=SCALE, seed=0)
        made = tok.decode_to_uint8(codes)
        if GPU:
            torch.cuda.synchronize()
        return codes, made

    def check(got: tuple[Tensor, Tensor]) -> dict[str, object]:
        codes, made = got
        assert made.shape == (CLASSES, 256, 256, 3) and made.dtype == torch.uint8
        facts = as_reference("classes", provider, codes.cpu().numpy())
        return {"images": CLASSES, "cfg_scale": SCALE, **facts}

    steps = step_work(gpt, 2 * CLASSES, 256, int8_cache=False)
    work = harness.Work(steps.bytes, steps.flops + CLASSES * flops()["decode"])
    measure(
        benchmark, CLASSES, work, provider=provider, fn=pictures, check=check,
        shape=f"classes to pictures, {PRESET} B={CLASSES} guided {PRECISION}",
    )  # fmt: skip
