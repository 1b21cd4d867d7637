"""Measure an emoji model: reconstructions of held-out images, and recognition of generated ones.

    python examples/emoji/evaluate.py examples/emoji/data CLASSIFIER [--tokenizer DIR] [--gpt DIR]

Reports PSNR and SSIM (8-bit, mean over images) of the reconstructed held-out emoji against the
tokenizer's input, and the share of images whose group `classifier.py`'s network names correctly: of
real held-out images, of their reconstructions, and of generated images, with and without guidance.
Groups are generated equally often, so chance is one in nine. Given the token cache that the
generator was trained on, it also reports how much of an image is memorised: the share of its codes
that the nearest training image has in the same places.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from classifier import GROUPS, SIZE, Classifier, accuracy, shrink
from pictures import read
from torch import Tensor

import vfmtok_fast as vf
from vfmtok_fast.evaluation.metrics import psnr, ssim
from vfmtok_fast.images import load_images, to_uint8


def readable(pictures: Tensor) -> Tensor:
    """Convert uint8 [N, S, S, 3] to the classifier's input: [N, 3, 64, 64] in [0, 1]."""
    return F.interpolate(pictures.permute(0, 3, 1, 2) / 255, SIZE, mode="area")


@torch.no_grad()
def reconstruct(tokenizer: vf.VFMTok, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return reconstructions, uint8 [N, S, S, 3], and codes [N, R], of images in [-1, 1]."""
    codes = torch.cat([tokenizer.encode(part) for part in images.split(32)])
    made = [to_uint8(tokenizer.decode(part)) for part in codes.split(32)]
    return torch.cat(made), codes


@torch.no_grad()
def generate(
    gpt: vf.GPT, tokenizer: vf.VFMTok, each: int, seed: int = 0, **sampling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Generate ``each`` images per group [N, 3, 64, 64] in [0, 1]; also return groups and codes."""
    labels = torch.arange(GROUPS).repeat_interleave(each)
    codes = gpt.generate(labels, seed=seed, **sampling)
    made = [to_uint8(tokenizer.decode(part)) for part in codes.split(32)]
    return readable(torch.cat(made)), labels, codes


@torch.no_grad()
def by_group(model: Classifier, images: Tensor, labels: Tensor) -> list[float]:
    """Accuracy on the images of each group."""
    right = (model(images).argmax(1) == labels).float()
    return [round(right[labels == group].mean().item(), 2) for group in range(GROUPS)]


def known(codes: Tensor, learned: Tensor) -> float:
    """Mean over images [N, R] of the share of codes that the closest of [M, R] has in place."""
    same = torch.stack([(learned == one).float().mean(1).max() for one in codes])
    return same.mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder that prepare.py wrote")
    parser.add_argument("classifier", type=Path, help="the file that classifier.py wrote")
    parser.add_argument("--tokenizer", default="emoji", help="a folder (%(default)s)")
    parser.add_argument("--gpt", default="emoji", help="a folder, or none (%(default)s)")
    parser.add_argument("--cache", type=Path, help="what the generator learned from")
    parser.add_argument("--each", type=int, default=40, help="pictures a group (%(default)s)")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    options = parser.parse_args()
    judge, heldout = Classifier.load(options.classifier), read(options.data / "heldout")
    tokenizer = vf.VFMTok.from_pretrained(options.tokenizer)
    files = sorted((options.data / "heldout").glob("*/*.webp"))
    images = load_images(files, tokenizer.config.image_size)
    real = to_uint8(images)
    made, codes = reconstruct(tokenizer, images)
    found = {
        "chance": 1 / GROUPS,
        "held-out pictures": len(files),
        "PSNR": psnr(real, made).mean().item(),
        "SSIM": ssim(real, made).mean().item(),
        # PSNR of a tokenizer that always returns white.
        "PSNR of white": psnr(real, torch.full_like(real, 255)).mean().item(),
        "codes in use": len(codes.unique()),
        "accuracy, real": accuracy(judge, shrink(heldout.images), heldout.labels),
        "accuracy, real, by group": by_group(judge, shrink(heldout.images), heldout.labels),
        "accuracy, reconstructed": accuracy(judge, readable(made), heldout.labels),
    }
    learned = None
    if options.cache is not None:
        views = [vf.cache.TokenCache(options.cache, view=v) for v in ("center", "center-flip")]
        learned = torch.stack([tokens for view in views for tokens, _ in view]).long()
        found["codes of the nearest training picture, held out"] = known(codes, learned)
    if options.gpt != "none":
        gpt = vf.GPT.from_pretrained(options.gpt)
        for scale in options.scales:
            drawn, labels, codes = generate(gpt, tokenizer, options.each, cfg_scale=scale)
            found[f"accuracy, generated, guidance {scale}"] = accuracy(judge, drawn, labels)
            found[f"by group, guidance {scale}"] = by_group(judge, drawn, labels)
            if learned is not None:
                name = f"codes of the nearest training picture, guidance {scale}"
                found[name] = known(codes, learned)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
