"""Peers in the benchmarks are called as documented, and never downloaded."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from vfmtok_fast.reference.deformable_sample import deformable_sample as reference

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LEVELS = ((6, 5), (3, 4))
B, Q, H, P, D = 3, 4, 2, 2, 8


@pytest.fixture
def peers():
    spec = importlib.util.spec_from_file_location("peers_under_test", BENCHMARKS / "peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def finished(value, sizes, starts, place, weights):
    """The compiled op's contract, by our reference: locations in [0, 1], weights that sum to 1."""
    wh = sizes.flip(1)[:, None].to(value.dtype)
    points = torch.zeros(1, place.shape[1], len(LEVELS), 2, dtype=value.dtype)
    return reference(value, LEVELS, points, place * wh, weights.log().flatten(-2))


def extension() -> types.ModuleType:
    module = types.ModuleType("MultiScaleDeformableAttention")

    def forward(value, sizes, starts, place, weights, step):
        assert len(value) % step == 0 and starts.tolist() == [0, 30]
        return finished(value, sizes, starts, place, weights)

    def backward(value, sizes, starts, place, weights, gradient, step):
        leaves = [x.detach().requires_grad_() for x in (value, place, weights)]
        with torch.enable_grad():
            out = finished(leaves[0], sizes, starts, *leaves[1:])
        return torch.autograd.grad(out, leaves, gradient)

    module.ms_deform_attn_forward, module.ms_deform_attn_backward = forward, backward
    return module


def test_a_compiled_extension_is_asked_as_it_wants_and_can_be_differentiated(peers, monkeypatch):
    monkeypatch.setitem(sys.modules, "MultiScaleDeformableAttention", extension())
    torch.manual_seed(0)
    sizes = torch.tensor(LEVELS)
    starts = torch.tensor([0, 30])
    wh = sizes.flip(1)[:, None].double()
    value = torch.randn(B, 42, H, D, dtype=torch.float64, requires_grad=True)
    points = torch.rand(1, Q, len(LEVELS), 2, dtype=torch.float64)
    offsets = torch.randn(B, Q, H, len(LEVELS), P, 2, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(B, Q, H, len(LEVELS) * P, dtype=torch.float64, requires_grad=True)
    place = (points[:, :, None, :, None] + offsets / wh).detach().requires_grad_()
    want = reference(value, LEVELS, points, offsets, logits)
    got = peers.compiled_extension()(value, sizes, starts, place, logits)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(want)
    wanted = torch.autograd.grad(want, (value, offsets, logits), cotangent)
    of_value, of_place, of_logits = torch.autograd.grad(got, (value, place, logits), cotangent)
    for gradient, truth in zip((of_value, of_place / wh, of_logits), wanted, strict=True):
        torch.testing.assert_close(gradient, truth)


def test_what_is_not_installed_says_so(peers, monkeypatch):
    for name in ("deformops", "MultiScaleDeformableAttention", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)
    for make in (peers.deformops, peers.compiled_extension, peers.from_the_hub):
        with pytest.raises(peers.NotHere, match=r"cannot be .* \((pip install|build) "):
            make()


def test_the_hub_is_asked_offline_only(peers, monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    before = constants.HF_HUB_OFFLINE
    asked = []

    def get_kernel(repo: str, revision: str):
        asked.append((repo, constants.HF_HUB_OFFLINE))
        raise FileNotFoundError("no snapshot folder\nand so on")

    hub = types.ModuleType("kernels")
    hub.get_kernel = get_kernel
    monkeypatch.setitem(sys.modules, "kernels", hub)
    with pytest.raises(peers.NotHere, match="not in the local cache.*no snapshot folder$"):
        peers.from_the_hub()
    assert asked == [("kernels-community/deformable-detr", True)]
    assert constants.HF_HUB_OFFLINE == before
