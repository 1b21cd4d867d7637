"""Named protocols: all that decides the third digit of a figure, in one frozen object each.

What differs from a named protocol says so in its name, so that a result can never pass for another
one's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch


@dataclass(frozen=True)
class Named:
    """Settings under a name, which says what was changed of them."""

    name: str

    def changed(self, **fields: Any) -> Self:
        """The same with other values of some fields (None: as it is), named by them."""
        now = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        other = {k: v for k, v in fields.items() if v is not None and v != now[k]}
        words = [f"{key}={value}" for key, value in other.items()]
        return dataclasses.replace(self, **other, name=", ".join([self.name, *words]))


@dataclass(frozen=True)
class Protocol(Named):
    """How pictures are compared.

    Attributes:
        num: how many pictures.
        size: side at which they are compared, in pixels.
        split: pictures of a split of the inception score.
    """

    num: int = 50_000
    size: int = 256
    split: int = 5000


@dataclass(frozen=True)
class Reconstruction(Protocol):
    """Pictures against their reconstructions; the reference of rFID are the very same crops.

    Attributes:
        crop: "centre": of raw pictures, by `images.center_crop` to the tokenizer's size; "none":
            the pictures are squares of ``size`` already, and are enlarged for the tokenizer.
        resize: of both pictures to ``size``, from 8 bit: "pillow" (bicubic, antialiased) or
            "torch" (bicubic of the floating picture, not antialiased).
        ssim_ranges: 1.0 is right for pictures in [0, 1]; the authors' script has 2.0.
    """

    crop: str = "centre"
    resize: str = "pillow"
    ssim_ranges: tuple[float, ...] = (1.0, 2.0)


@dataclass(frozen=True)
class Generation(Protocol):
    """Generated pictures against a reference that the user names.

    Attributes:
        neighbours: of precision and recall.
        distances: of precision and recall: "float16", rounded as ADM's evaluator does, or
            "float64".
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
    """A protocol of a kind by its name.

    Raises:
        ValueError: there is none, or it is of another kind.
    """
    known = [name for name, value in PROTOCOLS.items() if isinstance(value, kind)]
    if name not in known:
        raise ValueError(f"protocol must be one of {', '.join(known)}, got {name!r}")
    return PROTOCOLS[name]


LABELS = ("balanced", "random")


def class_ids(labels: str, num: int, classes: int, seed: int = 0) -> torch.Tensor:
    """Classes of pictures to generate.

    Args:
        labels: "balanced": all classes in turn, which gives a lower FID (RAE states 0.1); "random":
            drawn one by one, as the authors' script does in each process.
        num, classes: pictures, and classes to choose from.
        seed: of the draws.

    Returns:
        int64 [num].
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, got {labels!r}")
    if labels == "balanced":
        return torch.arange(num) % classes
    return torch.randint(classes, (num,), generator=torch.Generator().manual_seed(seed))


def described_labels(labels: np.ndarray) -> dict[str, Any]:
    """Whether some labels are balanced, and over how many classes."""
    counts = np.unique(labels, return_counts=True)[1]
    kind = "balanced" if counts.max() - counts.min() <= 1 else "not balanced"
    fewest, most = int(counts.min()), int(counts.max())
    return {"labels": kind, "classes": len(counts), "per_class": [fewest, most]}
