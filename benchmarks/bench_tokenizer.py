"""The tokenizer whole and by stage: encode, decode, round trip, at full size.

Providers: the reference, `enable()`, on a GPU the reference under torch.compile too, and *release
style*: the reference with TF32 products, whose deformable attention is `F.grid_sample`, as the
authors' code runs without its CUDA extension. Each is held against the reference in float32 before
its time counts. Operations are counted by torch, with what `upsample_conv` saves not taken off, so
the percentage of the limit may exceed what the convolutions themselves reach.
"""

from __future__ import annotations

import functools
import json
import runpy
import time
from collections.abc import Callable

import harness
import pytest
import torch
from harness import DEVICE, GPU
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vfmtok_fast
from vfmtok_fast import VFMTok, VFMTokConfig

GOLDEN = harness.ROOT / "tests" / "data" / "golden"
BATCHES = (64, 1) if GPU else (4,)
# A full-size encode takes seconds on a CPU.
ROUNDS = 20 if GPU else 3
PRECISIONS = ("bfloat16", "float16", "mixed", "tf32", "float32") if GPU else ("float32", "bfloat16")
# Fewest tokens that must be as in float32, whoever computes; with weights of the golden recipe.
AGREE = {"float32": 0.9999, "tf32": 0.98, "float16": 0.98, "mixed": 0.99, "bfloat16": 0.85}
# Largest difference of decoded values from the reference's in float32, which are in about [-3, 3].
APART = {"float32": 1e-3, "tf32": 0.05, "float16": 0.05, "mixed": 1e-3, "bfloat16": 0.5}


@functools.lru_cache(maxsize=1)
def model(precision: str) -> VFMTok:
    """The tokenizer with the weights of the tests' golden recipe: random, of trained sizes."""
    recipe = runpy.run_path(str(GOLDEN / "recipe.py"))["recipe_tensor"]
    shapes = json.loads((GOLDEN / "tokenizer_full.keys.json").read_text())
    tensors = {key: torch.from_numpy(recipe(key, shape)) for key, shape in shapes.items()}
    return VFMTok.from_official(tensors).set_precision(precision).to(DEVICE).eval()


@functools.cache
def images(B: int) -> Tensor:
    """Smooth noise, which has something of a photograph's spectrum."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(B, 3, 42, 42, generator=draw) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=336, mode="bicubic").clamp(-1, 1).to(DEVICE)


@functools.cache
def exact(B: int) -> tuple[Tensor, Tensor]:
    """Codes and pixels of the reference in float32; pixels of at most 4 pictures."""
    tok = model("float32")
    with torch.no_grad():
        codes = tok.encode(images(B))
        return codes, tok.decode(codes[:4])


def stage_inputs(tok: VFMTok, B: int) -> dict[str, tuple[Callable[[Tensor], object], object]]:
    """What each stage computes, and of what."""
    pictures, codes = images(B).to(tok.dtype), exact(B)[0]
    maps = tok.backbone(pictures)
    queries = tok.quantizer.queries(tok.region_encoder(maps))
    vectors = tok.quantizer.lookup(codes)
    decoder = tok.token_decoder
    z = decoder.pixel_map(decoder.regions(vectors))
    return {
        "backbone": (tok.backbone, pictures),
        "region encoder": (tok.region_encoder, maps),
        "quantiser": (tok.quantizer.nearest, queries),
        "token decoder": (lambda v: decoder.pixel_map(decoder.regions(v)), vectors),
        "pixel decoder": (tok.pixel_decoder, z),
    }


WHOLE: dict[str, Callable[[VFMTok, Tensor, Tensor], object]] = {
    "encode": lambda tok, pictures, codes: tok.encode(pictures),
    "decode": lambda tok, pictures, codes: tok.decode(codes),
    "round trip": lambda tok, pictures, codes: tok.decode_to_uint8(tok.encode(pictures), 336),
}
STAGES = ("backbone", "region encoder", "quantiser", "token decoder", "pixel decoder")


@functools.cache
def flops() -> dict[str, int]:
    """Operations of one picture, counted on tensors without values."""
    counts = {}

    def count(name: str, call: Callable, *given) -> object:
        with FlopCounterMode(display=False) as counter:
            out = call(*given)
        counts[name] = counter.get_total_flops()
        return out

    with torch.device("meta"):
        tok = VFMTok(VFMTokConfig()).eval()
    tok.to_empty(device="cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        decoder = tok.token_decoder
        maps = count("backbone", tok.backbone, torch.empty(1, 3, 336, 336))
        regions = count("region encoder", tok.region_encoder, maps)
        queries = count("queries", tok.quantizer.queries, regions)
        vectors = torch.empty(1, tok.config.num_regions, tok.config.codebook_dim)
        z = count("token decoder", lambda v: decoder.pixel_map(decoder.regions(v)), vectors)
        count("pixel decoder", tok.pixel_decoder, z)
    counts["quantiser"] = 2 * queries.numel() * tok.config.codebook_size
    # torch counts no attention of a CPU: two products over all pairs of tokens.
    config = tok.config.backbone
    tokens = tok.config.feature_grid**2 + 1 + config.num_registers
    counts["backbone"] += 4 * tokens**2 * config.dim * config.depth
    counts["encode"] = sum(
        counts[name] for name in ("backbone", "region encoder", "queries", "quantiser")
    )
    counts["decode"] = counts["token decoder"] + counts["pixel decoder"]
    counts["round trip"] = counts["encode"] + counts["decode"]
    return counts


def providers(what: str) -> list[str]:
    found = ["reference", "fast"]
    if GPU and what in WHOLE:
        found += ["reference compiled", "release style"]
    return found


def check_of(what: str, tok: VFMTok, B: int) -> Callable[[object], dict[str, object]]:
    codes, pixels = exact(B)

    def check(got: object) -> dict[str, object]:
        facts: dict[str, object] = {"batch": B}
        if what in ("encode", "quantiser"):
            share = float((got == codes).float().mean())
            assert share >= AGREE[tok.precision], f"only {share:.2%} of the tokens agree"
            facts["codes_as_float32"] = round(share, 5)
        elif what in ("decode", "pixel decoder"):
            apart = float((got[:4].float() - pixels).abs().max())
            assert apart <= APART[tok.precision], f"off by {apart:.2e}"
            facts["apart"] = apart
        return facts

    return check


CASES = [
    (B, precision, what)
    for precision in PRECISIONS
    for B in BATCHES
    for what in (*WHOLE, *(STAGES if B > 1 else ()))
    # On a CPU the file takes minutes as it is.
    if GPU or (what in ("encode", "decode") or (what in STAGES and precision == "float32"))
]


@functools.lru_cache(maxsize=1)
def in_turns(B: int, precision: str, what: str) -> dict[str, list[float]]:
    """On a CPU: seconds of the reference and of ours, in turns, for others share the machine."""
    tok, codes = model(precision), exact(B)[0]
    pictures, seconds = images(B).to(tok.dtype), {"reference": [], "fast": []}
    for _ in range(2):
        for provider, times in seconds.items():
            with vfmtok_fast.enable(None if provider == "fast" else ()):
                start = time.perf_counter()
                WHOLE[what](tok, pictures, codes)
                times.append(time.perf_counter() - start)
    return seconds


@pytest.mark.parametrize(
    ("B", "precision", "what", "provider"),
    [(*case, provider) for case in CASES for provider in providers(case[2])],
)
def bench_tokenizer(benchmark, B: int, precision: str, what: str, provider: str):
    if provider == "release style":
        if precision != "tf32":
            pytest.skip("the release computes in float32 with TF32 products")
    codes, _ = exact(B)
    tok = model(precision)
    with torch.no_grad():
        if what in WHOLE:
            call, pictures = WHOLE[what], images(B).to(tok.dtype)
            if provider == "reference compiled":
                call = torch.compile(call, dynamic=False)
            fn = functools.partial(call, tok, pictures, codes)
        else:
            stage, given = stage_inputs(tok, B)[what]
            fn = functools.partial(stage, given)
        check = check_of(what, tok, B)

        def facts(got: object) -> dict[str, object]:
            return check(got) | {"precision": precision}

        weights = sum(w.nbytes for w in tok.parameters())
        handle = vfmtok_fast.enable() if provider == "fast" else None
        try:
            harness.measure(
                benchmark,
                op="tokenizer_stages" if what in STAGES else "tokenizer_whole",
                shape=f"{what} B={B} {precision}",
                provider=provider,
                fn=fn,
                check=facts,
                work=harness.Work(bytes=weights, flops=B * flops()[what]),
                rounds=ROUNDS,
                slow=not GPU,
                replay=False,
                times=in_turns(B, precision, what)[provider] if what in WHOLE and not GPU else None,
            )
        finally:
            if handle is not None:
                handle.close()
    record = harness.session.records[-1]
    record["images_s"] = round(B / record["median_us"] * 1e6, 2)
