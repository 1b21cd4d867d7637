"""Count the tokens that each precision leaves unchanged: `python benchmarks/precision.py`.

The full-size tokenizer encodes seeded random crops of photographs with the reference in float32 and
with each precision, and equal tokens are counted. `float32` is the fast path, and each other
precision is the model after `set_precision`. A CPU has no TF32, and `mixed` uses it: there their
rounding is emulated in float32 arithmetic. Both factors of a product are rounded, and in half
precision the result is too. ``--parts`` rounds one part of the foundation model at a time, to see
which must stay wide.

The weights follow the tests' golden recipe: random, but of trained magnitude. Records are written
to precision/ of the results after every batch; a second run continues where the last one ended:

    python benchmarks/precision.py --crops 1000
    python benchmarks/precision.py --images photos/ --model vfmtok/
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import random
import runpy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import bounds
import harness
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

import vfmtok_fast
from vfmtok_fast import VFMTok, ops
from vfmtok_fast.images import decode_image, to_float
from vfmtok_fast.tokenizer.precision import PRECISIONS
from vfmtok_fast.untrained import untrained_tokenizer

GOLDEN = harness.ROOT / "tests" / "data" / "golden"
PHOTOS = harness.ROOT / "examples" / "images"
MARKS = "<!-- precision: by `make report` -->", "<!-- end of precision -->"
PARTS = ("patch", "qkv", "attention", "proj", "fc1", "fc2", "stream")
PRODUCTS = PARTS[:-1]
BATCH = 4
# Number of crops whose decoded images are compared: decoding costs as much as encoding.
DECODED = 8


def narrow(x: Tensor, kind: str | None) -> Tensor:
    """Round ``x`` to the values of a type, and keep its dtype."""
    if kind is None:
        return x
    if kind == "tf32":
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    return x.to(getattr(torch, kind)).to(x.dtype)


def product(layer: torch.nn.Linear, x: Tensor, kind: str | None) -> Tensor:
    bias = layer.bias if kind in (None, "tf32") else narrow(layer.bias, kind)
    y = ops.linear(narrow(x, kind), narrow(layer.weight, kind), bias)
    return y if kind == "tf32" else narrow(y, kind)


def attended(q: Tensor, k: Tensor, v: Tensor, kind: str | None, causal: bool = False) -> Tensor:
    """Attention as in a fused kernel: wide scores, weights rounded for the second product."""
    if kind is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    q, k, v = (narrow(x, kind) for x in (q, k, v))
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    if causal:
        scores += scores.new_full(scores.shape[-2:], -math.inf).triu(1)
    return narrow(narrow(scores.softmax(-1), kind) @ v, kind)


def read(tok: VFMTok, images: Tensor, kinds: dict[str, str]) -> list[Tensor]:
    """Return the backbone's maps, with rounding in the parts that ``kinds`` names."""
    backbone, vit = tok.backbone, tok.backbone.vit
    x = ((images.clamp(-1, 1) + 1) / 2 - backbone.mean) / backbone.std
    kind, conv = kinds.get("patch"), vit.patch_embed.proj
    patches = F.conv2d(
        narrow(x, kind), narrow(conv.weight, kind), narrow(conv.bias, kind), conv.stride
    )
    patches = patches if kind == "tf32" else narrow(patches, kind)
    x = vit._pos_embed(patches.flatten(2).transpose(1, 2))
    stream, maps = kinds.get("stream"), []
    for i, block in enumerate(vit.blocks):
        attention = block.attn
        qkv = product(attention.qkv, block.norm1(narrow(x, stream)), kinds.get("qkv"))
        q, k, v = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = attended(q, k, v, kinds.get("attention")).transpose(1, 2).flatten(2)
        x = narrow(x, stream) + block.ls1(product(attention.proj, mixed, kinds.get("proj")))
        h = product(block.mlp.fc1, block.norm2(narrow(x, stream)), kinds.get("fc1"))
        h = product(block.mlp.fc2, narrow(F.gelu(h), kinds.get("fc1")), kinds.get("fc2"))
        x = narrow(x, stream) + block.ls2(h)
        if i in backbone.levels:
            maps.append(x[:, vit.num_prefix_tokens :])
    maps[-1] = vit.norm(x)[:, vit.num_prefix_tokens :]
    return maps


class Rounded(TorchFunctionMode):
    """Round as with TF32: both factors of every linear layer; attention is in float16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, *bias = args
            args = (narrow(x, "tf32"), narrow(weight, "tf32"), *bias)
        if func is F.scaled_dot_product_attention:
            return attended(*args, "float16", causal=kwargs["is_causal"])
        return func(*args, **(kwargs or {}))


def all_products(kind: str) -> dict[str, str]:
    return dict.fromkeys(PRODUCTS, kind)


# How a precision is emulated: rounding in the backbone, and whether what follows has TF32.
EMULATED: dict[str, tuple[dict[str, str], bool]] = {
    "mixed": (all_products("float16"), True),
    "mixed, no tf32": (all_products("float16"), False),
    "mixed of bfloat16": (all_products("bfloat16"), False),
    "tf32": (all_products("tf32") | {"attention": "float16"}, True),
}


def emulated(tok: VFMTok, images: Tensor, kinds: dict[str, str], tf32: bool) -> Tensor:
    with vfmtok_fast.enable("linear"), Rounded() if tf32 else contextlib.nullcontext():
        queries = tok.quantizer.queries(tok.region_encoder(read(tok, images, kinds)))
    with vfmtok_fast.enable():
        return tok.quantizer.nearest(queries)


def emulations(parts: bool) -> dict[str, Callable[[VFMTok, Tensor], Tensor]]:
    """Functions that return the codes of images, by what is rounded."""
    wanted = dict(EMULATED)
    if parts:
        wanted |= {f"only {part} in float16": ({part: "float16"}, False) for part in PARTS}
    return {
        name: functools.partial(emulated, kinds=kinds, tf32=tf32)
        for name, (kinds, tf32) in wanted.items()
    }


def fast(tok: VFMTok, images: Tensor) -> Tensor:
    with vfmtok_fast.enable():
        return tok.encode(images.to(tok.dtype))


def real(
    model: Callable[[], VFMTok], device: torch.device, precisions: Iterable[str]
) -> dict[str, Callable[[VFMTok, Tensor], Tensor]]:
    """Functions that return the codes of the model in each precision, made when first called."""

    @functools.cache
    def made(precision: str) -> VFMTok:
        return model().set_precision(precision).to(device)

    return {name: lambda tok, images, name=name: fast(made(name), images) for name in precisions}


def golden_model() -> VFMTok:
    """Return the full-size tokenizer with the golden recipe's weights."""
    recipe_tensor = runpy.run_path(str(GOLDEN / "recipe.py"))["recipe_tensor"]
    shapes = json.loads((GOLDEN / "tokenizer_full.keys.json").read_text())
    return VFMTok.from_official(
        {key: torch.from_numpy(recipe_tensor(key, shape)) for key, shape in shapes.items()}
    )


def crops(folder: Path, size: int, first: int, count: int) -> Iterator[np.ndarray]:
    """Yield seeded square crops, half to all of an image's short side; every other one mirrored."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise SystemExit(f"{folder}: holds no pictures (.jpg, .png)")
    for number in range(first, first + count):
        draw = random.Random(number)
        with decode_image(paths[number % len(paths)]) as picture:
            side = round(min(picture.size) * draw.uniform(0.5, 1))
            left, top = (draw.randint(0, length - side) for length in picture.size)
            square = picture.crop((left, top, left + side, top + side))
        square = square.resize((size, size), Image.Resampling.BICUBIC)
        array = np.asarray(square)
        yield array[:, ::-1] if number % 2 else array


def psnr(a: Tensor, b: Tensor) -> float:
    """PSNR in decibels of images in [-1, 1]."""
    error = float((a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean())
    return 10 * math.log10(4 / error) if error else math.inf


def measure(
    tok: VFMTok, images: Tensor, variants: dict[str, Callable], found: dict[str, dict], decode: int
) -> None:
    """Add the results of a batch to ``found``."""
    exact = tok.encode_regions(images)[0]
    codes, scores = ops.nearest_code(
        exact.flatten(0, 1), tok.quantizer.codebook, k=2, return_score=True
    )
    margins = (scores[:, 0] - scores[:, 1]).view(len(images), -1)
    codes = codes[:, 0].view(len(images), -1)
    pixels = tok.decode(codes[:decode]) if decode else None
    for name, encode in variants.items():
        other = encode(tok, images)
        row = found.setdefault(name, {"equal": [], "margins_of_differing": [], "psnr": []})
        row["equal"] += (other == codes).sum(1).tolist()
        row["margins_of_differing"] += [round(m, 8) for m in margins[other != codes].tolist()]
        if decode:
            again = tok.decode(other[:decode])
            row["psnr"] += [round(psnr(a, b), 2) for a, b in zip(pixels, again, strict=True)]
        share = np.array(row["equal"]) / codes.shape[1]
        spread = share.std(ddof=1) / len(share) ** 0.5 if len(share) > 1 else math.nan
        print(f"{name}: {share.mean():.4%} +- {spread:.4%} of {len(share)} crops", flush=True)


def summary(row: dict, tokens: int) -> tuple[str, str]:
    """Share of equal tokens with its standard error, and the effect of the others on the image."""
    share = np.array(row["equal"]) / tokens
    spread = share.std(ddof=1) / len(share) ** 0.5
    said = f"{share.mean():.2%} ± {spread:.2%} of {len(share):,} crops"
    if (others := len(share) * tokens - sum(row["equal"])) < 10:
        said = f"all but {others}" if others else "all"
        said += f" of {len(share) * tokens:,}, in {len(share):,} crops"
    if not row["psnr"]:
        return said, "not compared"
    decibels = [d for d in row["psnr"] if math.isfinite(d)]
    picture = f"{len(row['psnr']) - len(decibels)} of {len(row['psnr'])} identical"
    if decibels:
        picture += f", the others at {np.median(decibels):.0f} dB PSNR"
    return said, picture


# The name of each precision here, and in the records of the H200.
ON_H200 = {
    "float32": "fp32", "tf32": "tf32", "float16": "fp16", "bfloat16": "bf16", "mixed": "mixed",
}  # fmt: skip


def table() -> list[str]:
    """README.md's lines on precision, made from the records."""
    lines, rows = [], {name: [name, "", "", "not measured"] for name in PRECISIONS}
    # Records with parts come last: they have fewer crops, and fill in what the others lack.
    paths = sorted((harness.ROOT / "benchmarks/results/precision").glob("*.json"))
    for path in sorted(paths, key=lambda path: path.stem.endswith("-parts")):
        content = json.loads(path.read_text())
        how = (
            "on a CPU (tf32 and mixed emulated there)" if content["emulated"] else f"on {path.stem}"
        )
        weights = content["weights"].replace("golden recipe", "random weights of the golden recipe")
        said = f"Tokens: {how}, with {weights} and crops of {content['images']}/."
        lines += [said] if said not in lines else []
        for name, row in content["found"].items():
            if name in rows and not rows[name][1]:
                rows[name][1:3] = summary(row, content["tokens_per_crop"])
    path = harness.ROOT / "benchmarks/results/nvidia-h200/tokenizer.json"
    content = json.loads(path.read_text())
    found = {(r["shape"], r["provider"]): r for r in content["records"]}
    for name, short in ON_H200.items():
        if record := found.get((f"encode B=64 {short}", "fast")):
            agree = record.get("codes_as_float32")
            share = "" if agree in (None, 1.0) else f", {agree:.2%} of tokens (random weights)"
            share += f" (at {record['commit']})" if "commit" in record else ""
            rows[name][3] = f"{record['images_s']:,.0f} images/s{share}"
    commit = content["environment"]["commit"]
    head = [
        "precision",
        "tokens unchanged from float32",
        "images decoded from them",
        f"encode on an H200 at {commit}",
    ]
    return [*bounds.table(head, rows.values()), "", *lines]


def rewrite() -> None:
    """Insert the table between README.md's marks."""
    path = harness.ROOT / "README.md"
    before, mark, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise SystemExit(f"{path}: the marks {MARKS} are missing")
    text = "\n".join([before + mark, "", *table(), "", end + after])
    path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--crops", type=int, default=64)
    parser.add_argument("--images", type=Path, default=PHOTOS, help="folder of photographs")
    parser.add_argument("--model", help="a folder made by convert; default: the golden recipe")
    parser.add_argument("--untrained", help="small: shows the work", choices=("small",))
    parser.add_argument("--parts", action="store_true", help="round one part at a time too")
    parser.add_argument("--only", nargs="+", help="names of the precisions to measure")
    parser.add_argument("--table", action="store_true", help="rewrite README.md's table alone")
    options = parser.parse_args()
    if options.table:
        rewrite()
        return

    def model() -> VFMTok:
        if options.untrained:
            return untrained_tokenizer(options.untrained).eval()
        made = VFMTok.from_pretrained(options.model) if options.model else golden_model()
        return made.eval()

    device = torch.device(harness.DEVICE)
    tok = model().to(device)
    name = harness.device_name() + ("-parts" if options.parts else "")
    path = harness.RESULTS / "precision" / f"{name}.json"
    source = options.untrained or options.model or "golden recipe"
    described = {"weights": str(source), "emulated": not harness.GPU, "images": options.images.name}
    content = json.loads(path.read_text()) if path.exists() else {}
    if {key: content.get(key) for key in described} != described:
        content = {**described, "tokens_per_crop": tok.config.num_regions, "found": {}}
    if options.parts:
        variants = emulations(True)
    elif harness.GPU:
        variants = real(model, device, PRECISIONS)
    else:
        variants = real(model, device, ("float32", "float16", "bfloat16")) | emulations(False)
    if options.only:
        variants = {name: variants[name] for name in options.only}
    batch = 64 if harness.GPU else BATCH
    with torch.inference_mode():
        while True:
            found = content["found"]
            has = {name: len(found[name]["equal"]) if name in found else 0 for name in variants}
            done = min(has.values())
            if done >= options.crops:
                break
            # Each variant continues where it ended.
            count = min(batch, options.crops - done, *(n - done for n in has.values() if n > done))
            behind = {name: variants[name] for name in variants if has[name] == done}
            views = np.stack(list(crops(options.images, tok.config.image_size, done, count)))
            decode = 0 if options.parts else max(0, min(count, DECODED - done))
            measure(tok, to_float(views).to(device), behind, found, decode)
            content["environment"] = harness.environment()
            harness.write_json(path, content)


if __name__ == "__main__":
    main()
