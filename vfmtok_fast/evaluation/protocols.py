"""Named protocols: everything that decides the third digit of a metric, in one frozen object each.

A protocol that differs from a named one says so in its name, so that its results cannot be mistaken
for those of the named one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch


@dataclass(frozen=True)
class Named:
    """Settings with a name that says which of them were changed."""

    name: str

    def changed(self, **fields: Any) -> Self:
        """Return a copy with some fields changed (None: unchanged) and listed in its name."""
        now = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        other = {k: v for k, v in fields.items() if v is not None and v != now[k]}
        words = [f"{key}={value}" for key, value in other.items()]
        return dataclasses.replace(self, **other, name=", ".join([self.name, *words]))


@dataclass(frozen=True)
class Protocol(Named):
    """How images are compared.

    Attributes:
        num: how many images.
        size: side of the images when they are compared, in pixels.
        split: images per split of the inception score.
    """

    num: int = 50_000
    size: int = 256
    split: int = 5000


@dataclass(frozen=True)
class Reconstruction(Protocol):
    """Images against their reconstructions; the reference of rFID is the same crops.

    Attributes:
        crop: "centre": crop raw images to the tokenizer's size with `images.center_crop`. "none":
            the images are squares of ``size`` already and are enlarged for the tokenizer.
        resize: how images and reconstructions are resized to ``size``: "pillow" (from 8 bits,
            bicubic, antialiased) or "torch" (from floating point, bicubic, not antialiased).
        ssim_ranges: 1.0 is right for images in [0, 1]; the authors' script has 2.0.
    """

    crop: str = "centre"
    resize: str = "pillow"
    ssim_ranges: tuple[float, ...] = (1.0, 2.0)


@dataclass(frozen=True)
class Generation(Protocol):
    """Generated images against a reference that the user names.

    Attributes:
        neighbours: number of neighbours for precision and recall.
        distances: for precision and recall: "float16", rounded as in ADM's evaluator, or "float64".
    """

    neighbours: int = 3
    distances: str = "float16"


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # The release's vqgan_test.py.
        Reconstruction("reconstruction-vfmtok"),
        Reconstruction("reconstruction-vfmtok-torch", resize="torch"),
        Reconstruction("reconstruction-crops", crop="none"),
        # The release's test_net.py and the evaluator of arXiv 2105.05233.
        Generation("generation-adm"),
        Generation("generation-float64", distances="float64"),
    )
}


def protocol(name: str, kind: type[Protocol]) -> Protocol:
    """Return a protocol of a kind by its name.

    Raises:
        ValueError: there is no such protocol, or it is of another kind.
    """
    known = [name for name, value in PROTOCOLS.items() if isinstance(value, kind)]
    if not known:
        raise ValueError(
            "protocol: kind must be Reconstruction or Generation (probes are in PROBES), got "
            f"{kind.__name__}"
        )
    if name not in known:
        raise ValueError(f"protocol must be one of {', '.join(known)}, got {name!r}")
    return PROTOCOLS[name]


LABELS = ("balanced", "random")


def class_ids(labels: str, num: int, classes: int, seed: int = 0) -> torch.Tensor:
    """Choose the classes of images to generate.

    Args:
        labels: "balanced": all classes in turn, which gives a lower FID (RAE states 0.1). "random":
            drawn one by one, as the authors' script does in each process.
        num, classes: number of images, and number of classes to choose from.
        seed: seed of the draws.

    Returns:
        int64 [num].
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, got {labels!r}")
    if labels == "balanced":
        return torch.arange(num) % classes
    return torch.randint(classes, (num,), generator=torch.Generator().manual_seed(seed))


def described_labels(labels: np.ndarray) -> dict[str, Any]:
    """Describe whether labels are balanced, and over how many classes."""
    counts = np.unique(labels, return_counts=True)[1]
    kind = "balanced" if counts.max() - counts.min() <= 1 else "not balanced"
    fewest, most = int(counts.min()), int(counts.max())
    return {"labels": kind, "classes": len(counts), "per_class": [fewest, most]}
