"""Train the classifier that judges generated emoji, independent of the models that made them.

    python examples/emoji/classifier.py examples/emoji/data OUT.safetensors

A small convolutional network trained on real images. Its architecture, seed and resolution path
differ from the foundation model's. `evaluate.py` uses it to classify real and generated images by
group.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from pictures import augment, read
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUPS, SIZE, WIDTHS = 9, 64, (24, 48, 96, 128)
SEED = 20_261


class Classifier(nn.Module):
    """Map images [B, 3, 64, 64] in [0, 1] to logits of the nine groups."""

    def __init__(self) -> None:
        super().__init__()
        layers, before = [], 3
        for width in WIDTHS:
            layers += [
                nn.Conv2d(before, width, 3, stride=2, padding=1),
                nn.GroupNorm(8, width),
                nn.ReLU(),
            ]
            before = width
        self.maps = nn.Sequential(*layers)
        self.head = nn.Linear(before, GROUPS)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.maps(2 * images - 1).amax((2, 3)))

    @classmethod
    def load(cls, path: str | Path) -> Classifier:
        model = cls()
        model.load_state_dict(load_file(path))
        return model.eval()


def shrink(images: Tensor) -> Tensor:
    """Convert uint8 images [B, 3, 128, 128] to the classifier's input: halved, in [0, 1]."""
    return F.avg_pool2d(images.float() / 255, images.shape[-1] // SIZE)


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Share of images [N, 3, 64, 64] in [0, 1] that the model classifies correctly."""
    return (model(images).argmax(1) == labels).float().mean().item()


def train(folder: Path, steps: int, batch_size: int) -> Classifier:
    """Train on the training images, drawing every group equally often."""
    torch.manual_seed(SEED)
    pictures, model = read(folder / "train.parquet"), Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    even = (1 / pictures.labels.bincount().float())[pictures.labels]
    for step in range(steps):
        rows = torch.multinomial(even, batch_size, replacement=True)
        logits = model(augment(pictures.images[rows], SIZE, colour=0.1))
        loss = F.cross_entropy(logits, pictures.labels[rows], label_smoothing=0.05)
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="the folder that prepare.py wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    model = train(options.data, options.steps, options.batch_size)
    for name in ("train.parquet", "heldout"):
        pictures = read(options.data / name)
        share = accuracy(model, shrink(pictures.images), pictures.labels)
        print(f"{name}: {share:.3f} of {len(pictures.labels)} right; chance is {1 / GROUPS:.3f}")
    # Half precision is enough for storing the weights.
    save_file({name: w.half() for name, w in model.state_dict().items()}, options.out)


if __name__ == "__main__":
    main()
