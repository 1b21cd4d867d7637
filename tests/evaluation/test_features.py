"""Inception: the right network, the right outputs, the right weights."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from vfmtok_fast.evaluation import Inception
from vfmtok_fast.evaluation.features import Activations


def test_without_torch_fidelity_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vfmtok-fast\[eval\]'"):
        Inception()


@pytest.mark.slow
def test_features_are_torch_fidelitys(pictures: np.ndarray, tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    ours = Inception()
    assert ours.described == {"weights": "random weights", "seed": 0}
    file = tmp_path / "weights.pth"
    torch.save(ours.network.state_dict(), file)
    theirs = module.FeatureExtractorInceptionV3(
        "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
    )
    inputs = []
    theirs.Mixed_6d.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    planes = torch.from_numpy(pictures[:2]).permute(0, 3, 1, 2)
    pool, logits = theirs(planes)
    block = theirs.Mixed_6d.branch1x1
    maps = torch.relu(block.bn(block.conv(inputs[0])))[:, :7]
    by_position = maps.numpy().transpose(0, 2, 3, 1).reshape(2, 17 * 17 * 7)

    read = Inception(file)
    assert read.described["weights"] == "weights.pth" and len(read.described["sha256"]) == 64
    found, spatial = read(pictures[:2])
    torch.testing.assert_close(found, pool, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(spatial, by_position, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read.logits(found), logits, rtol=1e-4, atol=1e-4)
    assert found.shape[1] == read.sizes["pool"] and spatial.shape[1] == read.sizes["spatial"]

    torch.save({"fc.weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match="expected the weights of weights-inception") as error:
        Inception(file)
    assert "\n" not in str(error.value)


def test_what_was_compared_is_told_by_hashes(inception, pictures: np.ndarray):
    whole, parts = Activations(inception), Activations(inception)
    whole.add(pictures)
    for part in np.split(pictures, 4):
        parts.add(part)
    assert whole.sha256 == parts.sha256 and whole.hashes == parts.hashes
    assert len(whole.hashes) == 24 and torch.equal(whole.pool, parts.pool)
    other = Activations(inception)
    other.add(pictures[::-1])
    assert other.sha256 != whole.sha256 and other.hashes == whole.hashes
