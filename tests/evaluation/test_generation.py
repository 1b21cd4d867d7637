"""Generated images against a reference: input, results, warnings and refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vfmtok_fast.evaluation import (
    PROTOCOLS,
    class_ids,
    evaluate_generation,
    frechet_distance,
    inception_score,
    precision_recall,
    protocol,
)
from vfmtok_fast.evaluation.features import Activations
from vfmtok_fast.evaluation.generation import _is_imagenet_val
from vfmtok_fast.evaluation.npz import Archive
from vfmtok_fast.evaluation.probes import Probe
from vfmtok_fast.evaluation.protocols import Generation, Reconstruction, described_labels

SMALL = PROTOCOLS["generation-float64"].changed(num=12, size=32)


@pytest.fixture
def files(tmp_path: Path, pictures: np.ndarray) -> tuple[Path, Path]:
    """Samples with labels, and a reference of other images."""
    np.savez(tmp_path / "samples.npz", arr_0=pictures[:12], arr_1=np.arange(12) % 3)
    np.savez_compressed(tmp_path / "reference.npz", arr_0=pictures[12:])
    return tmp_path / "samples.npz", tmp_path / "reference.npz"


def encrypted() -> bytes:
    """An .npz whose one member claims to need a password."""
    file = io.BytesIO()
    np.savez(file, arr_0=np.zeros((12, 32, 32, 3), np.uint8))
    data = bytearray(file.getvalue())
    data[6] |= 1  # flags of the member's own header, and of the directory's
    data[data.rindex(b"PK\1\2") + 8] |= 1
    return bytes(data)


def seen(inception, pictures: np.ndarray) -> Activations:
    found = Activations(inception)
    found.add(pictures)
    return found


def test_figures_and_what_is_told(files, inception, pictures: np.ndarray):
    done = []
    result = evaluate_generation(*files, SMALL, inception, batch_size=5, advance=done.append)
    made, real = seen(inception, pictures[:12]), seen(inception, pictures[12:])
    statistics = [x.moments["pool"].statistics() for x in (made, real)]
    metrics = result["metrics"]
    assert metrics["FID"] == pytest.approx(frechet_distance(*statistics), rel=1e-6)
    assert metrics["IS"] == pytest.approx(inception_score(inception.logits(made.pool)))
    pair = metrics["precision"], metrics["recall"]
    assert pair == precision_recall(real.pool, made.pool)
    assert sum(done) == 24 and result["compared"]["sha256"] == made.sha256
    assert result["protocol"]["name"] == "generation-float64, num=12, size=32"
    assert result["compared"]["labels"] == "balanced" and result["compared"]["classes"] == 3
    assert result["reference"]["pictures"] == 12 and len(result["reference"]["sha256"]) == 64
    assert result["warnings"] == [] and result["sampling"] is None
    json.dumps(result, allow_nan=False)


def test_statistics_count_and_pictures_beside_them_only_for_neighbours(
    files, inception, pictures: np.ndarray
):
    """As in VIRTUAL_imagenet256_labeled.npz, whose statistics are of more images than it holds."""
    samples, reference = files
    moments = seen(inception, pictures).moments
    found = moments["pool"].statistics()
    values = {"mu": found.mean.numpy(), "sigma": found.covariance.numpy()}
    np.savez(reference, **values)
    metrics = evaluate_generation(samples, reference, SMALL, inception)["metrics"]
    own = seen(inception, pictures[:12]).moments["pool"].statistics()
    assert metrics["FID"] == pytest.approx(frechet_distance(own, found))
    assert metrics["sFID"] is None and metrics["precision"] is None and metrics["IS"] > 1
    np.savez(reference, arr_0=pictures[12:], **values)
    both = evaluate_generation(samples, reference, SMALL, inception)["metrics"]
    assert both["FID"] == metrics["FID"] and both["sFID"] is None and both["recall"] > 0
    # With statistics for sFID alone, FID comes from the images.
    spatial = moments["spatial"].statistics()
    values = {"mu_s": spatial.mean.numpy(), "sigma_s": spatial.covariance.numpy()}
    np.savez(reference, arr_0=pictures[12:], **values)
    alone = evaluate_generation(samples, reference, SMALL, inception)["metrics"]
    target = seen(inception, pictures[12:]).moments["pool"].statistics()
    assert alone["FID"] == pytest.approx(frechet_distance(own, target))
    own = seen(inception, pictures[:12]).moments["spatial"].statistics()
    assert alone["sFID"] == pytest.approx(frechet_distance(own, spatial))


def test_a_doubtful_reference_is_warned_of(files, inception, pictures: np.ndarray, tmp_path: Path):
    samples, _ = files
    np.savez(tmp_path / "imagenet_val.npz", arr_0=pictures[10:])
    np.savez(samples, arr_0=np.concatenate([pictures[:11], pictures[:1]]), arr_1=[0] * 6 + [1] * 6)
    told = evaluate_generation(samples, tmp_path / "imagenet_val.npz", SMALL, inception)["warnings"]
    assert "looks like a validation set" in told[0] and len(told) == 3
    assert told[1].startswith("1 of the pictures are the reference's own")
    assert told[2].startswith("1 of the pictures appear more than once")


@pytest.mark.parametrize(
    ("labels", "validation"),
    [
        (np.arange(50_000) % 1000, True),
        (np.arange(50_000) % 1000 * 1.0, False),
        ((np.arange(50_000) % 1000)[:, None], False),
        (np.arange(10), False),
    ],
    ids=["right", "float", "column", "few"],
)
def test_a_references_labels_only_tell_a_validation_set(tmp_path: Path, labels, validation: bool):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((50_000, 1, 1, 3), np.uint8), arr_1=labels)
    assert _is_imagenet_val(Archive(tmp_path / "a.npz")) == validation


@pytest.mark.parametrize("text", ["[1]", "null", '{"seed": NaN}', '{"seed": 1e999}', "{"])
def test_damaged_settings_are_told_before_the_work(files, inception, tmp_path: Path, text: str):
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises(ValueError, match=r"samples.json is damaged \(") as error:
        evaluate_generation(*files, SMALL, inception, advance=lambda count: pytest.fail("worked"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arr_0": np.zeros((12, 16, 16, 3), np.uint8)}, "must have 32x32 pixels, got 16x16"),
        ({"arr_0": np.zeros((5, 32, 32, 3), np.uint8)}, "12 pictures were asked for, it holds 5"),
        ({"arr_0": np.zeros((12, 32, 32, 3), np.uint8)}, "holds no labels (arr_1); --no-labels"),
        ({"arr_0": np.zeros((12, 32, 32, 3))}, "must be uint8 pictures [N, H, W, 3], got float64"),
        ({"arr_1": np.zeros(12)}, "holds no pictures (arr_0)"),
    ],
)
def test_wrong_samples(files, inception, values: dict, message: str):
    np.savez(files[0], **values)
    with pytest.raises(ValueError) as error:
        evaluate_generation(*files, SMALL, inception)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(files[0]) in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arr_0": np.zeros((9, 16, 16, 3), np.uint8)}, "must have 32x32 pixels, got 16x16"),
        ({"labels": np.zeros(3)}, "neither pictures (arr_0) nor statistics (mu and sigma)"),
        ({"mu": np.zeros(12)}, "has mu, but not both of mu and sigma"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "mu must have 12 features as this Inception"),
        ({"mu": np.zeros(12), "sigma": np.eye(9)}, "must be [D] and [D, D], got [12] and [9, 9]"),
        (b"PK\3\4, and no more", "is not an .npz, or is damaged"),
        (encrypted(), "is encrypted"),
        (None, "no such file; pictures are evaluated as ADM's .npz"),
    ],
)
def test_wrong_references(files, inception, values: dict | bytes | None, message: str):
    files[1].unlink()
    if isinstance(values, bytes):
        files[1].write_bytes(values)
    elif values is not None:
        np.savez(files[1], **values)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        evaluate_generation(*files, SMALL, inception)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_labels():
    assert class_ids("balanced", 7, 3).tolist() == [0, 1, 2, 0, 1, 2, 0]
    drawn = class_ids("random", 3000, 3, seed=5)
    assert torch.equal(drawn, class_ids("random", 3000, 3, seed=5))
    assert not torch.equal(drawn, class_ids("random", 3000, 3, seed=6))
    assert described_labels(drawn.numpy())["labels"] == "not balanced"
    assert described_labels(np.arange(10) % 3)["per_class"] == [3, 4]
    with pytest.raises(ValueError, match="must be one of balanced, random, got 'even'"):
        class_ids("even", 3, 3)


def test_a_changed_protocol_says_so_in_its_name():
    named = protocol("generation-adm", Generation)
    assert (named.num, named.size, named.split, named.neighbours) == (50_000, 256, 5000, 3)
    assert named.distances == "float16" and named.changed(num=50_000, size=None) == named
    assert named.changed(num=10).name == "generation-adm, num=10"
    theirs = protocol("reconstruction-vfmtok", Reconstruction)
    assert theirs.resize == "pillow" and theirs.ssim_ranges == (1.0, 2.0)
    with pytest.raises(
        ValueError, match="must be one of reconstruction-vfmtok, .*'generation-adm'"
    ):
        protocol("generation-adm", Reconstruction)
    with pytest.raises(ValueError, match="probes are in PROBES"):
        protocol("probe-sgd", Probe)
