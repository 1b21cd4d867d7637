"""The paper's claims in miniature, on emoji: what makes codes easy to learn for a generator?

    python benchmarks/ablation/run.py OUT [--steps 2500] [--gpt-steps 3000]
    python benchmarks/ablation/plot.py OUT

Three tokenizers use the foundation model of the emoji model that comes with the package and are
otherwise trained from scratch. They differ in one thing each:

- `whole`: as in the paper;
- `no-semantic`: without the semantic loss, so that codes only need to represent pixels;
- `grid`: each region looks at one point of a plain grid and does not learn where to look.

For each, a generator is trained on the codes. At intervals it generates images of each group, with
and without guidance, and a classifier that was trained independently of both models names their
groups. The comparison is how many generator steps it takes until a given share is recognised
(`plot.py`).

OUT receives one file `<variant>-<seed>.json` per finished run. Runs that have a file are not
repeated, so the script may be stopped, and processes with other seeds may share OUT.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import vfmtok_fast as vf
from vfmtok_fast.configs import config_from_mapping
from vfmtok_fast.training import (
    GPTTrainer,
    GPTTraining,
    Pictures,
    TokenizerTrainer,
    TokenizerTraining,
)

EMOJI = Path(__file__).parents[2] / "examples" / "emoji"
sys.path.insert(0, str(EMOJI))
from classifier import Classifier, accuracy  # noqa: E402
from evaluate import generate, readable, reconstruct  # noqa: E402
from pictures import read  # noqa: E402
from start import look, place  # noqa: E402

from vfmtok_fast.cache.sources import open_source  # noqa: E402
from vfmtok_fast.evaluation.metrics import psnr  # noqa: E402
from vfmtok_fast.images import load_images, to_uint8  # noqa: E402

VARIANTS = ("whole", "no-semantic", "grid")
PICTURES, HELDOUT = EMOJI / "data" / "train.parquet", EMOJI / "data" / "heldout"
CLASSIFIER = EMOJI / "classifier.safetensors"


def tokenizer_of(variant: str, seed: int, device: torch.device) -> vf.VFMTok:
    """Return an untrained tokenizer; with ``grid``, regions always look at their own places."""
    trained = vf.VFMTok.from_pretrained("emoji")
    # Use only the part of the trained tokenizer that was not trained as a tokenizer.
    torch.manual_seed(seed)
    model = vf.VFMTok(trained.config)
    model.backbone.load_state_dict(trained.backbone.state_dict())
    if variant == "grid":
        for layer in model.region_encoder.layers:
            for part in (layer.cross_attention.offsets, layer.cross_attention.weights):
                for weight in part.parameters():
                    torch.nn.init.zeros_(weight).requires_grad_(False)
    place(model)
    look(model.eval(), read(PICTURES).images)
    return model.to(device)


def train_tokenizer(
    model: vf.VFMTok, variant: str, seed: int, steps: int, batch_size: int
) -> vf.VFMTok:
    settings = TokenizerTraining(
        lr=1e-3, warmup_steps=min(100, steps // 10), schedule="cosine", total_steps=steps,
        min_lr=1e-5, ema=0.995, pixel_loss="l1", perceptual_weight=0, revive_after=500, seed=seed,
        semantic_weight=0.0 if variant == "no-semantic" else 1.0,
    )  # fmt: skip
    trainer = TokenizerTrainer(model, settings)
    pictures = Pictures(open_source(PICTURES), batch_size, size=model.config.image_size, seed=seed)
    batches = pictures.batches(0)
    for _ in range(steps):
        trainer.step(*pictures.arguments(next(batches), trainer.device))
    batches.close()
    return trainer.ema


@torch.no_grad()
def codes_of(model: vf.VFMTok) -> tuple[Tensor, Tensor]:
    """Return codes [2 N, R] and groups of all images, unchanged and mirrored."""
    emoji = read(PICTURES)
    size = (model.config.image_size,) * 2
    images = F.interpolate(emoji.images / 127.5 - 1, size, mode="bicubic", antialias=True)
    images = torch.cat([images, images.flip(-1)]).clamp(-1, 1).split(64)
    codes = torch.cat([model.encode(some.to(model.device)) for some in images])
    return codes, torch.cat([emoji.labels, emoji.labels]).to(model.device)


@torch.no_grad()
def quality(model: vf.VFMTok) -> dict[str, float]:
    """Return PSNR and the share of correctly recognised groups of reconstructed held-out images."""
    files = sorted(HELDOUT.glob("*/*.webp"))
    images = load_images(files, model.config.image_size)
    made, codes = reconstruct(model, images.to(model.device))
    judge, labels = Classifier.load(CLASSIFIER), read(HELDOUT).labels
    return {
        "psnr": psnr(to_uint8(images), made.cpu()).mean().item(),
        "accuracy": accuracy(judge, readable(made.cpu()), labels),
        "codes_in_use": len(codes.unique()),
    }


def train_generator(
    model: vf.VFMTok, seed: int, steps: int, every: int, each: int, guidance: float
) -> list[dict[str, float]]:
    """Train a generator and record what the classifier recognises at intervals."""
    config = config_from_mapping(vf.GPTConfig, json.loads((EMOJI / "generator.json").read_text()))
    torch.manual_seed(seed)
    settings = GPTTraining(lr=1e-3, warmup_steps=100, ema=0.995, seed=seed)
    trainer = GPTTrainer(vf.GPT(config).to(model.device), settings)
    judge, (codes, labels) = Classifier.load(CLASSIFIER), codes_of(model)
    draw = torch.Generator().manual_seed(seed)
    curve, losses = [], []
    for step in range(1, steps + 1):
        rows = torch.randint(len(codes), (32,), generator=draw).to(model.device)
        losses.append(trainer.step(codes[rows], labels[rows])["loss"])
        if step % every == 0 or step == steps:
            some = losses[-every:]
            point = {"step": step, "loss": sum(some) / len(some)}
            for name, scale in (("accuracy", 1.0), ("accuracy_guided", guidance)):
                drawn, groups, _ = generate(trainer.ema, model, each, cfg_scale=scale)
                point[name] = accuracy(judge, drawn.cpu(), groups)
            curve.append(point)
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=2500, help="of a tokenizer (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--gpt-steps", type=int, default=3000, help="(%(default)s)")
    parser.add_argument("--every", type=int, default=100, help="steps (%(default)s)")
    parser.add_argument("--each", type=int, default=40, help="pictures a group (%(default)s)")
    parser.add_argument("--guidance", type=float, default=2.0, help="(%(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for seed in options.seeds:
        for variant in options.variants:
            path = options.out / f"{variant}-{seed}.json"
            if path.exists():
                continue
            begin = time.perf_counter()
            model = tokenizer_of(variant, seed, device)
            with vf.enable():
                model = train_tokenizer(model, variant, seed, options.steps, options.batch_size)
                made = quality(model)
                curve = train_generator(
                    model, seed, options.gpt_steps, options.every, options.each, options.guidance
                )
            record = {
                "variant": variant, "seed": seed, "reconstructed": made, "curve": curve,
                "tokenizer_steps": options.steps, "batch_size": options.batch_size,
                "guidance": options.guidance, "pictures_a_group": options.each,
                "device": str(device), "seconds": round(time.perf_counter() - begin, 1),
            }  # fmt: skip
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{path}: {made} {curve[-1]}", flush=True)


if __name__ == "__main__":
    main()
