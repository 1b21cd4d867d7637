"""Features of the tokenizer, and the classifiers that are trained on them."""

from __future__ import annotations

import dataclasses
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vfmtok_fast import VFMTok, images
from vfmtok_fast.cache.sources import open_source
from vfmtok_fast.evaluation import PROBES, evaluate_probe, linear_probe, nearest_neighbours
from vfmtok_fast.evaluation.probes import _optimizer, accuracy
from vfmtok_fast.tokenizer.model import PROBED

QUICK = dataclasses.replace(PROBES["probe-sgd"], epochs=20, warmup_epochs=2, batch_size=32)


def test_probe_features(tokenizer: VFMTok, photos: Path):
    crops = images.load_images(sorted(photos.rglob("*.png"))[:3], 64)
    shapes = {which: tuple(tokenizer.probe_features(crops, which).shape) for which in PROBED}
    assert shapes == {"semantic-class": (3, 32), "regions": (3, 32), "codes": (3, 16 * 12)}
    with torch.no_grad():
        vectors = tokenizer.quantizer.lookup(tokenizer.encode(crops))
        encoded = tokenizer.region_encoder(tokenizer.backbone(crops))
    assert torch.equal(tokenizer.probe_features(crops, "codes"), vectors.flatten(1))
    torch.testing.assert_close(tokenizer.probe_features(crops, "regions"), encoded.mean(1))
    with pytest.raises(ValueError, match="must be one of semantic-class, regions, codes"):
        tokenizer.probe_features(crops, "class")


def test_semantic_class_is_the_hidden_state_before_the_slice(tokenizer: VFMTok, photos: Path):
    """The state equals that of a whole pass, whose patches and registers the token cannot see."""
    crops = images.load_images(sorted(photos.rglob("*.png"))[:3], 64)
    decoder, hidden = tokenizer.token_decoder, []
    hook = decoder.layers[-1].register_forward_hook(lambda module, args, out: hidden.append(out))
    with torch.no_grad():
        decoder.features(decoder.regions(tokenizer.quantizer.lookup(tokenizer.encode(crops))))
    hook.remove()
    (whole,) = hidden
    assert whole.shape == (3, 16 + 1 + 16 + 4, 32)
    found = tokenizer.probe_features(crops, "semantic-class")
    torch.testing.assert_close(found, whole[:, 16], rtol=1e-5, atol=1e-5)


def blobs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points of three classes, far from zero, with scales that differ by a thousand."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 3
    points = centres[labels] + torch.randn(count, 8, generator=draw)
    return points * torch.logspace(-2, 1, 8) + 5, labels


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_linear_probe(optimizer: str):
    (train, labels), (test, truth) = blobs(150, 1), blobs(90, 2)
    # LARS moves the weights by a thousandth of their norm times the learning rate.
    rate = 0.1 if optimizer == "sgd" else 80.0
    probe = dataclasses.replace(QUICK, optimizer=optimizer, base_lr=rate)
    found = linear_probe(train, labels, test, 3, probe)
    assert accuracy(found, truth) > 0.95
    assert torch.equal(found, linear_probe(train, labels, test, 3, probe))
    shuffled = labels[torch.randperm(150, generator=torch.Generator().manual_seed(3))]
    assert accuracy(linear_probe(train, shuffled, test, 3, probe), truth) < 0.7
    with pytest.raises(ValueError, match="must be one of sgd, lars, got 'adam'"):
        linear_probe(train, labels, test, 3, dataclasses.replace(probe, optimizer="adam"))


def test_lars_is_maes():
    """The weight moves by a thousandth of its norm times the rate, the bias by its gradient."""
    layer = torch.nn.Linear(5, 3)
    before = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = _optimizer(layer, dataclasses.replace(PROBES["probe-mae"], base_lr=2.0))
    layer.weight.grad, layer.bias.grad = torch.randn(3, 5), torch.ones(3)
    optimizer.step()
    step = (layer.weight.detach() - before[0]).norm() / before[0].norm()
    assert float(step) == pytest.approx(2.0 * 0.001, rel=1e-4)
    torch.testing.assert_close(layer.bias.detach(), before[1] - 2.0)


def test_nearest_neighbours_vote_by_weight():
    (train, labels), (test, _) = blobs(40, 1), blobs(9, 2)
    probe = dataclasses.replace(QUICK, neighbours=5, temperature=0.07)
    a, b = (x.double().numpy() for x in (train, test))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    expected = np.zeros((9, 3))
    for row, cosine in enumerate(b @ a.T):
        for place in np.argsort(-cosine)[:5]:
            expected[row, labels[place]] += np.exp(cosine[place] / 0.07)
    np.testing.assert_allclose(nearest_neighbours(train, labels, test, 3, probe), expected, 1e-3)


def test_evaluate_probe(tokenizer: VFMTok, photos: Path, tmp_path: Path):
    """Features of random weights are enough to tell red from blue."""
    source = open_source(photos)
    result = evaluate_probe(tokenizer, source, source, QUICK, "regions", batch_size=4)
    assert result["metrics"]["linear, top 1"] == 1.0
    assert result["metrics"]["chance, the largest class"] == 0.5
    assert result["protocol"]["features"] == "regions"
    held = evaluate_probe(tokenizer, source, None, QUICK, "codes")
    assert (held["compared"]["train_pictures"], held["compared"]["test_pictures"]) == (8, 2)
    assert held["compared"]["test"] == "every fifth picture of a class"
    with pytest.raises(ValueError, match="no class has five pictures"):
        evaluate_probe(tokenizer, source, None, QUICK, "codes", num=4)
    (tmp_path / "green").mkdir()
    Image.new("RGB", (70, 80)).save(tmp_path / "green" / "x.png")
    other = open_source(tmp_path)
    with pytest.raises(ValueError, match="its classes are not those of .*: 'green' instead of"):
        evaluate_probe(tokenizer, source, other, QUICK, "codes")
    shutil.copytree(photos, tmp_path / "more")
    (tmp_path / "green").rename(tmp_path / "more" / "green")
    other = open_source(tmp_path / "more")
    with pytest.raises(ValueError, match="'green' has no training images; leave it out of the"):
        evaluate_probe(tokenizer, source, other, QUICK, "codes")


def test_labels_of_archives(tokenizer: VFMTok, photos: Path, tmp_path: Path):
    """Classes without names are matched by number; an image with a damaged label is left out."""
    with tarfile.open(tmp_path / "shard-000.tar", "w") as archive:
        for number, path in enumerate(sorted(photos.rglob("*.png"))):
            label = "dog" if number == 3 else str(int(number >= 5))
            for ending, data in ((".png", path.read_bytes()), (".cls", label.encode())):
                member = tarfile.TarInfo(f"{number:03}{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    shard = open_source(tmp_path / "shard-000.tar", "webdataset")
    result = evaluate_probe(tokenizer, open_source(photos), shard, QUICK, "regions")
    assert result["metrics"]["linear, top 1"] == 1.0
    assert result["compared"]["unreadable"] == 1 and result["compared"]["test_pictures"] == 9
    assert result["compared"]["test"].endswith("shard-000.tar")
    assert any("matched by their numbers, because " in line for line in result["warnings"])
