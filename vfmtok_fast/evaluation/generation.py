"""Quality of generated images: FID, sFID, IS, precision and recall, as ADM computes them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cache.sources.choice import named_split
from ..cache.store import LocalPlace
from .features import Activations, Inception
from .metrics import frechet_distance, inception_score, precision_recall
from .npz import LABELS, STATISTICS, Archive
from .protocols import Generation, described_labels


def evaluate_generation(
    samples: str | os.PathLike,
    reference: str | os.PathLike,
    protocol: Generation,
    inception: Inception,
    *,
    labelled: bool = True,
    batch_size: int = 64,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Compare generated images with a reference.

    Args:
        samples: ADM's .npz, or a folder from `vfmtok-fast sample`.
        reference: ADM's .npz with images, or statistics of pool_3 and of mixed_6/conv, or both,
            like VIRTUAL_imagenet256_labeled.npz. FID and sFID use the statistics, precision and
            recall the images. Without statistics, all of them use the images.
        protocol: how to compare them.
        inception: computes the features.
        labelled: the samples' labels are part of the protocol; False does without labels.
        batch_size: images at a time.
        advance: called with the number of images done, in samples and reference.

    Returns:
        The result as plain JSON values. Metrics that the reference does not allow are None.

    Raises:
        FileNotFoundError, ValueError: a file is missing or not what it must be.
    """
    made, real = Archive(samples), open_reference(reference, protocol, inception)
    made.check_pictures(protocol.num, protocol.size)
    labels = described_labels(made.labels(protocol.num)) if labelled else {"labels": "not given"}
    sampling = _settings(made.path)
    seen, target = Activations(inception), Activations(inception) if real.count else None
    for archive, count, into in ((made, protocol.num, seen), (real, real.count, target)):
        for pictures in archive.pictures(count, batch_size) if count else ():
            into.add(pictures)
            advance(len(pictures))
    return {
        "protocol": dataclasses.asdict(protocol),
        "compared": {
            "samples": str(made.path), "pictures": protocol.num, "sha256": seen.sha256, **labels,
        },
        "sampling": sampling,
        "reference": {
            "file": str(real.path), "sha256": real.sha256(), "pictures": real.count,
            "statistics": [n for pair in STATISTICS.values() for n in pair if n in real.members],
        },
        "inception": inception.described,
        "metrics": _metrics(protocol, real, seen, target),
        "warnings": _warnings(protocol, real, seen, target),
    }  # fmt: skip


def open_reference(path: str | os.PathLike, protocol: Generation, inception: Inception) -> Archive:
    """Open a reference and check that it suits this protocol and network.

    Raises:
        FileNotFoundError, ValueError: the file is missing, has images of another size, statistics
            of other features, or neither images nor statistics; or there are too few images.
    """
    real = Archive(path)
    statistics = {which: real.statistics(which) for which in STATISTICS}
    for which, found in statistics.items():
        if found is not None and len(found.mean) != inception.sizes[which]:
            raise ValueError(
                f"{real.path}: {STATISTICS[which][0]} must have {inception.sizes[which]} features "
                f"as this Inception does, got {len(found.mean)}"
            )
    if real.count:
        real.check_pictures(real.count, protocol.size)
    elif statistics["pool"] is None:
        raise ValueError(
            f"{real.path}: is not a reference: it holds neither pictures (arr_0) nor statistics "
            "(mu and sigma)"
        )
    # Checked before the work. A covariance needs two images, a k-th neighbour more than k.
    least = protocol.neighbours + 1 if real.count else 2
    for name, count in (("--num", protocol.num), (real.path, real.count)):
        if count < least and (name == "--num" or count):
            raise ValueError(f"{name}: {count} pictures are too few, the metrics need {least}")
    return real


def _metrics(
    protocol: Generation, real: Archive, seen: Activations, target: Activations | None
) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    known = {which: real.statistics(which) for which in STATISTICS}
    if known["pool"] is None:
        made = {which: moments.statistics() for which, moments in target.moments.items()}
        known = {which: known[which] or made[which] for which in made}
    # If the file has statistics, none are computed from its images: ADM's are of other images.
    for name, which in (("FID", "pool"), ("sFID", "spatial")):
        own, against = seen.moments[which].statistics(), known[which]
        found[name] = None if against is None else frechet_distance(own, against)
    found["IS"] = inception_score(seen.inception.logits(seen.pool), protocol.split)
    found |= {"precision": None, "recall": None}
    if target is not None:
        half = protocol.distances == "float16"
        pools = (one.pool.to(seen.inception.device) for one in (target, seen))
        found["precision"], found["recall"] = precision_recall(*pools, protocol.neighbours, half)
    return found


def _warnings(
    protocol: Generation, real: Archive, seen: Activations, target: Activations | None
) -> list[str]:
    found = []
    if named_split(real.path.name) == "validation" or _is_imagenet_val(real):
        found.append(
            f"the reference ({real.path.name}) looks like a validation set; published gFIDs are "
            "against the training set"
        )
    if target is not None and (same := len(seen.hashes & target.hashes)):
        found.append(f"{same} of the pictures are the reference's own, byte for byte")
    if twins := protocol.num - len(seen.hashes):
        found.append(f"{twins} of the pictures appear more than once")
    return found


def _is_imagenet_val(archive: Archive) -> bool:
    """Whether there are 50 images of each of 1,000 classes, as in the validation set only."""
    if archive.count != 50_000 or LABELS not in archive.members:
        return False
    try:
        found = described_labels(archive.labels(archive.count))
    except ValueError:  # Not class labels; the labels of a reference serve only a warning.
        return False
    return found["classes"] == 1000 and found["per_class"] == [50, 50]


def _settings(samples: Path) -> dict[str, Any] | None:
    """Settings that `vfmtok-fast sample` wrote beside the images: seed, guidance, weights."""
    path = samples.with_name("samples.json")
    if samples.name != "samples.npz" or not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text())
        json.dumps(settings, allow_nan=False)  # The result is written the same way.
        if not isinstance(settings, dict):
            raise ValueError("it must hold an object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return settings | {"noise": "keyed by seed, image 0 to num - 1, step"}


def plot_sweep(path: str | os.PathLike, results: list[dict[str, Any]]) -> bool:
    """Plot FID against IS, one point per guidance scale, as a .png.

    Args:
        path: file to write.
        results: from `evaluate_generation`, each with its "cfg_scale".

    Returns:
        False if matplotlib is not installed and nothing was written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    points = [(r["metrics"]["IS"], r["metrics"]["FID"], f"{r['cfg_scale']:g}") for r in results]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o")
    for x, y, scale in points:
        axes.annotate(scale, (x, y), textcoords="offset points", xytext=(5, 5))
    axes.set_xlabel("inception score")
    axes.set_ylabel("FID")
    name, network = (results[0][key] for key in ("protocol", "inception"))
    title = f"guidance scales, {name['name']}; Inception: {network['weights']}"
    axes.set_title(title, fontsize="small")
    with LocalPlace(path).writing() as file:
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return True
