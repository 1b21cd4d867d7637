"""What features reveal about classes: a linear probe and nearest neighbours.

The linear probe follows MAE: batch norm without scale and shift, then one linear layer. Features
are computed once, so MAE's random crops are missing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.format.fingerprint import weights_checksum
from ..cache.sources import Source
from ..tokenizer import VFMTok
from .pictures import Pictures, model_input
from .protocols import Named

OPTIMIZERS = ("sgd", "lars")
# Number of test images at a time, compared with the whole training set.
ROWS = 1000


@dataclass(frozen=True)
class Probe(Named):
    """Settings of a probe.

    Attributes:
        optimizer: "sgd", or "lars" as in MAE, which needs ImageNet's 1.28 million images and
            thousands of steps to move the weights far enough.
        batch_size: images per step; at most all.
        base_lr: the learning rate is this times batch_size / 256.
        epochs, warmup_epochs: of the linear probe; a cosine to 0 follows the warm-up.
        neighbours, temperature: of the vote, in which each neighbour weighs exp(cosine /
            temperature).
        seed: seed of the initial weights and the order.

    Source: arXiv 2111.06377, appendix A.1; neighbours: arXiv 2104.14294, section 4.1.
    """

    optimizer: str = "sgd"
    batch_size: int = 256
    base_lr: float = 0.1
    epochs: int = 90
    warmup_epochs: int = 10
    neighbours: int = 20
    temperature: float = 0.07
    seed: int = 0


PROBES = {
    probe.name: probe
    for probe in (Probe("probe-sgd"), Probe("probe-mae", optimizer="lars", batch_size=16_384))
}


def linear_probe(train: Tensor, labels: Tensor, test: Tensor, classes: int, probe: Probe) -> Tensor:
    """Train a linear classifier on features and classify other features.

    Args:
        train: [N, D] floating-point.
        labels: int64 [N] in [0, classes).
        test: [M, D].
        classes: number of classes.
        probe: settings.

    Returns:
        Logits of ``test``, float32 [M, classes].

    Raises:
        ValueError: there is no such optimizer, or there are fewer than 2 features to train on.
    """
    if len(train) < 2:
        raise ValueError(f"linear_probe: needs at least 2 features to train on, got {len(train)}")
    generator = torch.Generator().manual_seed(probe.seed)
    layer = nn.Linear(train.shape[1], classes)
    nn.init.trunc_normal_(layer.weight, std=0.01, generator=generator)
    nn.init.zeros_(layer.bias)
    head = nn.Sequential(nn.BatchNorm1d(train.shape[1], affine=False, eps=1e-6), layer)
    head.to(train.device).train()
    train, labels = train.float(), labels.to(train.device)
    size = min(probe.batch_size, len(train))
    steps = len(train) // size
    optimizer = _optimizer(layer, probe)
    for step in range(probe.epochs * steps):
        if step % steps == 0:
            order = torch.randperm(len(train), generator=generator).to(train.device)
        for group in optimizer.param_groups:
            group["lr"] = _rate(probe, step / steps) * size / 256
        rows = order[(step % steps) * size :][:size]
        optimizer.zero_grad()
        F.cross_entropy(head(train[rows]), labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return torch.cat([head.eval()(part.float()) for part in test.split(ROWS)])


def _optimizer(layer: nn.Linear, probe: Probe) -> torch.optim.Optimizer:
    if probe.optimizer == "sgd":
        return torch.optim.SGD(layer.parameters(), lr=probe.base_lr, momentum=0.9)
    if probe.optimizer != "lars":
        raise ValueError(
            f"linear_probe: optimizer must be one of {', '.join(OPTIMIZERS)}, got "
            f"{probe.optimizer!r}"
        )
    # Imported here because timm imports Triton. Biases are not adapted, as in MAE.
    from timm.optim import Lars

    groups = [
        {"params": [layer.weight], "always_adapt": True},
        {"params": [layer.bias], "always_adapt": False},
    ]
    return Lars(groups, lr=probe.base_lr, momentum=0.9)


def _rate(probe: Probe, epoch: float) -> float:
    """MAE's learning rate: linear warm-up, then half a cosine to 0."""
    warmup = probe.warmup_epochs
    if epoch < warmup:
        return probe.base_lr * epoch / warmup
    done = (epoch - warmup) / max(probe.epochs - warmup, 1)
    return probe.base_lr * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def nearest_neighbours(
    train: Tensor, labels: Tensor, test: Tensor, classes: int, probe: Probe
) -> Tensor:
    """Votes of the nearest features by cosine, each weighted by exp(cosine / temperature).

    Args:
        train, labels, test, classes: as for `linear_probe`.
        probe: its ``neighbours`` (at most all) and ``temperature``.

    Returns:
        Votes, float32 [M, classes].
    """
    known = F.normalize(train.float(), dim=1)
    k, labels = min(probe.neighbours, len(train)), labels.to(train.device)
    votes = []
    for part in test.split(ROWS):
        cosine, places = (F.normalize(part.float(), dim=1) @ known.T).topk(k, dim=1)
        weight = (cosine / probe.temperature).exp()
        votes.append(weight.new_zeros(len(part), classes).scatter_add_(1, labels[places], weight))
    return torch.cat(votes)


def accuracy(scores: Tensor, labels: Tensor, top: int = 1) -> float:
    """Share of rows of ``scores`` [M, classes] whose label is among the ``top`` highest scores."""
    best = scores.topk(min(top, scores.shape[1]), dim=1).indices.cpu()
    return float((best == labels.cpu()[:, None]).any(dim=1).double().mean())


def features(
    tokenizer: VFMTok, pictures: Pictures, which: str, batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`VFMTok.probe_features` of images, float32 [N, D] on the model's device, and labels [N]."""
    found, labels = [], []
    for batch in pictures.batches(batch_size):
        images = model_input(batch.squares, tokenizer.device, tokenizer.dtype)
        found.append(tokenizer.probe_features(images, which).float())
        labels.append(torch.from_numpy(batch.labels))
        advance(len(batch.labels))
    if not found:
        raise ValueError(f"{pictures.source.shown}: no picture could be read")
    return torch.cat(found), torch.cat(labels)


def evaluate_probe(
    tokenizer: VFMTok, train: Source, test: Source | None, probe: Probe, which: str,
    *, num: int | None = None, batch_size: int = 16, workers: int = 4,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:  # fmt: skip
    """Probe a tokenizer's features of labelled images.

    Args:
        tokenizer: in eval mode.
        train, test: labelled images; without ``test``, every fifth image of a class is held out.
        probe: settings.
        which: which features, see `VFMTok.probe_features`.
        num: number of training images, evenly spaced; None: all.
        batch_size: images at a time in the tokenizer.
        workers: number of reader threads.
        advance: called with the number of images done.

    Returns:
        The result as plain JSON values.

    Raises:
        ValueError: images have no labels, ``test`` has other classes, or no images are left to test
            on.
    """
    if probe.epochs <= probe.warmup_epochs:
        raise ValueError(
            f"probe: {probe.epochs} epochs end within the protocol's {probe.warmup_epochs} of "
            "warm-up; take more"
        )
    side = tokenizer.config.image_size
    sets = [Pictures(train, side, num=num, workers=workers, labelled=True)]
    names = train.classes(max(entry.label for entry in sets[0].entries))
    warnings = []
    if test is not None:
        sets.append(Pictures(test, side, workers=workers, labelled=True))
        other = test.classes(max(entry.label for entry in sets[1].entries))
        warnings += _check_classes(names, other, f"{test.shown}", f"{train.shown}")
    found = [features(tokenizer, some, which, batch_size, advance) for some in sets]
    (known, labels), *rest = found
    if rest:
        held, truth = rest[0]
    else:
        out = _every_fifth(labels)
        (held, truth), (known, labels) = (known[out], labels[out]), (known[~out], labels[~out])
        if not len(held):
            raise ValueError(
                f"{train.shown}: no class has five pictures; name test pictures with --test"
            )
    classes = max(len(names), int(truth.max()) + 1)
    if bad := sum(len(some.bad) for some in sets):
        warnings.append(f"{bad} pictures could not be read and were left out")
    name = probe.name if num is None else f"{probe.name}, num={num}"
    linear = linear_probe(known, labels, held, classes, probe)
    votes = nearest_neighbours(known, labels, held, classes, probe)
    return {
        "protocol": dataclasses.asdict(probe) | {"name": name, "features": which},
        "compared": {
            "train": str(train.shown), "chosen": train.chosen, "train_pictures": len(known),
            "test": str(test.shown) if test else "every fifth picture of a class",
            "test_pictures": len(held), "classes": classes,
            "unreadable": bad,
            "features_sha256": weights_checksum({"train": known, "test": held}),
        },
        "tokenizer": {
            "sha256": weights_checksum(tokenizer.state_dict()), "precision": tokenizer.precision,
        },
        "metrics": {
            "linear, top 1": accuracy(linear, truth), "linear, top 5": accuracy(linear, truth, 5),
            f"{probe.neighbours} neighbours, top 1": accuracy(votes, truth),
            "chance, the largest class": float(truth.bincount().max() / len(truth)),
        },
        "warnings": warnings,
    }  # fmt: skip


def _check_classes(names: list[str], other: list[str], test: str, train: str) -> list[str]:
    """Refuse other classes; warn if only the class numbers can be compared."""
    numbered = [all(name == str(i) for i, name in enumerate(some)) for some in (names, other)]
    if numbered[0] != numbered[1]:
        which = (test, train)[numbered[0]]
        return [f"classes are matched by their numbers, because {which} has no names for them"]
    for ours, theirs in zip(names, other, strict=False):
        if ours != theirs:
            raise ValueError(
                f"{test}: its classes are not those of {train}: {theirs!r} instead of {ours!r}"
            )
    if not numbered[0] and len(other) > len(names):
        raise ValueError(
            f"{test}: its classes are not those of {train}: {other[len(names)]!r} has no training "
            "images; leave it out of the test images"
        )
    return []


def _every_fifth(labels: Tensor) -> Tensor:
    """Whether an image is the fifth, tenth, ... of its class, bool [N]."""
    place = torch.zeros_like(labels)
    for label in labels.unique():
        mine = labels == label
        place[mine] = torch.arange(1, int(mine.sum()) + 1)
    return place % 5 == 0
