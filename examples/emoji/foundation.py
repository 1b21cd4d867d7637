"""Train the small vision transformer that the emoji tokenizer uses as its foundation model.

    python examples/emoji/foundation.py examples/emoji/data/train.parquet OUT.pth

The model predicts the pixels of masked patches (SimMIM, arXiv 2111.09886), so that its features
keep what an image looks like, and the 99 subgroups as classes, so that they represent what it
shows. The output file uses DINOv2's names, so `vfmtok-fast train-tokenizer --backbone` can read it.
If the command is run again, it resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from pictures import augment, read
from torch import Tensor, nn

from vfmtok_fast import VFMTokConfig
from vfmtok_fast.configs import config_from_mapping
from vfmtok_fast.tokenizer.backbone import Backbone

CONFIG = Path(__file__).with_name("tokenizer.json")
SUBGROUPS = 99
LR, WEIGHT_DECAY, WARMUP = 1e-3, 0.05, 200
# The class loss has a small weight, because a network of this size soon memorises all images.
CLASS_WEIGHT = 0.1


class Foundation(nn.Module):
    """The tokenizer's backbone, not frozen, with a token for masked patches and two heads."""

    def __init__(self, config: VFMTokConfig):
        super().__init__()
        self.backbone = Backbone(config.backbone, config.feature_grid)
        vit = self.backbone.vit.requires_grad_(True)
        for block in vit.blocks:
            # timm initialises these to 1e-5, for models much deeper than this one.
            nn.init.constant_(block.ls1.gamma, 0.5)
            nn.init.constant_(block.ls2.gamma, 0.5)
        dim, self.patch = vit.embed_dim, config.backbone.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.pixels = nn.Linear(dim, 3 * self.patch**2)
        self.classes = nn.Linear(2 * dim, SUBGROUPS)

    def forward(self, images: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [B, 3, S, S] in [0, 1] and a patch mask [B, N] to patches and logits."""
        vit = self.backbone.vit
        x = vit.patch_embed((images - self.backbone.mean) / self.backbone.std)
        x = torch.where(masked[..., None], self.mask_token, x)
        x = vit.norm(vit.blocks(vit._pos_embed(x)))
        patches = x[:, vit.num_prefix_tokens :]
        return self.pixels(patches), self.classes(torch.cat([x[:, 0], patches.mean(1)], dim=1))

    def loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        vit, side = self.backbone.vit, self.patch
        # The share of hidden patches differs from image to image; some hide none.
        hidden = torch.rand(len(images), 1) * 0.7
        masked = torch.rand(len(images), vit.patch_embed.num_patches) < hidden
        pixels, logits = self(images, masked)
        target = F.unfold(images, side, stride=side).transpose(1, 2)
        error = F.l1_loss(pixels, target, reduction="none").mean(-1)
        # Visible patches count too, so that the last features still contain them.
        weight = torch.where(masked, 1.0, 0.3)
        return {
            "pixels": (weight * error).sum() / weight.sum(),
            "class": F.cross_entropy(logits, labels, label_smoothing=0.1),
        }

    def dinov2(self) -> dict[str, Tensor]:
        """Return the transformer's weights under the names in DINOv2's files."""
        state = {name: weight.clone() for name, weight in self.backbone.vit.state_dict().items()}
        state["register_tokens"] = state.pop("reg_token")
        # DINOv2 gives the class token a position too.
        table = state["pos_embed"]
        state["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
        return state | {"mask_token": self.mask_token.detach().clone()}


def rate(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP)
    return LR * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(options: argparse.Namespace) -> None:
    config = config_from_mapping(VFMTokConfig, json.loads(CONFIG.read_text()))
    pictures = read(options.pictures)
    torch.manual_seed(options.seed)
    model = Foundation(config)
    optimizer = torch.optim.AdamW(model.parameters(), LR, (0.9, 0.95), weight_decay=WEIGHT_DECAY)
    kept, done = options.out.with_suffix(".run"), 0
    if kept.is_file():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["step"]
    start = time.perf_counter()
    for step in range(done, options.steps):
        torch.manual_seed(options.seed * 1_000_003 + step)
        rows = torch.randint(len(pictures.images), (options.batch_size,))
        images = augment(pictures.images[rows], config.image_size)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            terms = model.loss(images, pictures.subgroups[rows])
        optimizer.zero_grad()
        (terms["pixels"] + CLASS_WEIGHT * terms["class"]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == options.steps:
            told = ", ".join(f"{name} {term.item():.3f}" for name, term in terms.items())
            speed = (step + 1 - done) * options.batch_size / (time.perf_counter() - start)
            print(f"step {step + 1}: {told}, {speed:.0f} images/s", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            store(state | {"step": step + 1}, kept)
    store(model.dinov2(), options.out)


def store(value: object, path: Path) -> None:
    """Write atomically, so that a run interrupted here can be resumed."""
    part = path.with_name(f"{path.name}.part")
    torch.save(value, part)
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bfloat16", action="store_true", help="where the processor computes it")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
