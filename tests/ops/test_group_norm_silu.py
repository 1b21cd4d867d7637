"""group_norm_silu and residual_block: references against the formula, and argument errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from residual_blocks import block, maps
from torch import Tensor

import vfmtok_fast
from vfmtok_fast.ops import group_norm_silu, residual_block


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    out = torch.empty_like(x)
    width = x.shape[1] // groups
    for image in range(len(x)):
        for first in range(0, x.shape[1], width):
            part = x[image, first : first + width]
            mean = part.sum() / part.numel()
            deviation = ((part - mean).square().sum() / part.numel() + eps).sqrt()
            for c in range(width):
                y = (part[c] - mean) / deviation * weight[first + c] + bias[first + c]
                out[image, first + c] = y / (1 + (-y).exp())
    return out


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
def test_norm_matches_the_formula(last):
    x = 3 * maps(2, 12, 5, 7) + 10
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    kept = x.clone()
    got = group_norm_silu(x, maps(12, seed=1), maps(12, seed=2), 4, 1e-3)
    torch.testing.assert_close(got, by_hand(x, maps(12, seed=1), maps(12, seed=2), 4, 1e-3))
    assert got.stride() == x.stride() and torch.equal(x, kept)


@pytest.mark.parametrize(("C", "O"), [(8, 8), (8, 12)])
def test_block_matches_the_formula(C, O):  # noqa: E741
    x, (norm1, conv1, norm2, conv2, shortcut) = maps(2, C, 6, 5), block(C, O, shortcut=C != O)
    kept = x.clone()
    got = residual_block(x, norm1, conv1, norm2, conv2, shortcut, num_groups=4, eps=1e-3)
    h = F.conv2d(by_hand(x, *norm1, 4, 1e-3), *conv1, padding=1)
    h = F.conv2d(by_hand(h, *norm2, 4, 1e-3), *conv2, padding=1)
    torch.testing.assert_close(got, h + (F.conv2d(x, *shortcut) if shortcut else x))
    assert torch.equal(x, kept)


def test_gradients():
    x = maps(2, 4, 3, 2).requires_grad_()
    leaves = [maps(4, seed=1).requires_grad_(), maps(4, seed=2).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *a: group_norm_silu(*a, 2), (x, *leaves))
    flat = [part.requires_grad_() for pair in block(4, 6) for part in pair]

    def run(x: Tensor, *parts: Tensor) -> Tensor:
        pairs = list(zip(parts[::2], parts[1::2], strict=True))
        return residual_block(x, *pairs, num_groups=2)

    assert torch.autograd.gradcheck(run, (x, *flat))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_enabled_on_a_cpu_takes_the_reference_and_says_nothing(dtype, recwarn):
    x, pairs = maps(2, 8, 4, 4, dtype=dtype), block(8, 8, dtype, shortcut=False)
    with vfmtok_fast.enable(["group_norm_silu", "residual_block"], strict=True):
        got = group_norm_silu(x, *pairs[0], 4), residual_block(x, *pairs, num_groups=4)
        status = vfmtok_fast.status()
    assert not recwarn.list
    for name, value in zip(("group_norm_silu", "residual_block"), got, strict=True):
        assert status.ops[name].calls == {"reference": 1} and value.dtype == dtype
        assert vfmtok_fast.switch.forecast(name, "cpu").startswith("reference")


def test_autocast_mixes_dtypes_only_while_it_is_on():
    x, pairs = maps(2, 8, 4, 4, dtype=torch.bfloat16), block(8, 12, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert residual_block(x, *pairs, num_groups=4).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="norm1's weight must be torch.bfloat16, as x is"):
        residual_block(x, *pairs, num_groups=4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, 4)}, ValueError, r"x must have shape \[B, C, H, W\]"),
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.int64)}, TypeError, "must be floating"),
        ({"weight": torch.zeros(7)}, ValueError, r"weight must have shape \(8,\)"),
        ({"bias": torch.zeros(8, dtype=torch.float16)}, TypeError, "bias must be torch.float32"),
        ({"bias": torch.zeros(8, device="meta")}, ValueError, "bias must be on cpu"),
        ({"num_groups": 3}, ValueError, "must divide the 8 channels, got 3"),
        ({"num_groups": 0}, ValueError, r"num_groups must be in \[1, 2\^31\), got 0"),
        ({"num_groups": 2.0}, TypeError, "num_groups must be an int"),
        ({"eps": -1.0}, ValueError, "eps must be finite and at least 0"),
    ],
)
def test_norm_refuses(change, error, message):
    good = {"x": torch.zeros(2, 8, 4, 4), "weight": torch.zeros(8), "bias": torch.zeros(8)}
    with pytest.raises(error, match=f"^group_norm_silu: .*{message}"):
        group_norm_silu(**{**good, "num_groups": 4, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shortcut": None}, "needs a shortcut from 8 to 12 channels"),
        ({"conv2": (torch.zeros(12, 8, 3, 3), torch.zeros(12))}, "conv2's weight must have shape"),
        ({"conv1": (torch.zeros(12, 8, 3, 3), torch.zeros(8))}, "conv1's bias must have shape"),
        ({"num_groups": 8}, "must divide the 12 channels"),
    ],
)
def test_block_refuses(change, message):
    names = ("norm1", "conv1", "norm2", "conv2", "shortcut")
    good = dict(zip(names, block(8, 12, torch.float32), strict=True)) | {"num_groups": 4}
    with pytest.raises(ValueError, match=f"^residual_block: .*{message}"):
        residual_block(torch.zeros(1, 8, 2, 2), **{**good, **change})


def test_no_images():
    x, pairs = maps(0, 8, 4, 4, dtype=torch.float32), block(8, 12, torch.float32)
    assert group_norm_silu(x, *pairs[0], 4).shape == (0, 8, 4, 4)
    assert residual_block(x, *pairs, num_groups=4).shape == (0, 12, 4, 4)
