"""On a CPU, the enabled sample_token gives the reference's codes and noise, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vfmtok_fast
from vfmtok_fast import ops
from vfmtok_fast.cpu import sample_token as cpu
from vfmtok_fast.reference import philox
from vfmtok_fast.reference import sample_token as reference

SEEDS = (0, 1, 2**32 - 1, 2**32, 2**63 + 12345, 2**64 - 1)
IDS = torch.tensor([0, 1, 5, 2**32 - 1, 2**32, 2**40 + 7, -1])
SETTINGS = [
    {},
    {"temperature": 0.5},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 100},
    {"top_k": 2000},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"top_k": 100, "top_p": 0.8, "temperature": 1.3},
    {"greedy": True, "top_k": 3},
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("V", [1, 7, 1001, 16384, 40000])
def test_noise_has_the_reference_bits(seed: int, V: int):
    for step in (0, 255, 2**32 - 1):
        expected = philox.gumbel_noise(seed, IDS, step, V)
        assert torch.equal(cpu.gumbel_noise(seed, IDS, step, V), expected)


def test_noise_takes_ids_and_steps_in_every_form():
    expected = philox.gumbel_noise(3, IDS[:3], 9, 50)
    for ids in (IDS[:3], IDS[:3].int(), IDS[:3].to(torch.uint8)):
        for step in (9, torch.tensor(9), torch.tensor([9], dtype=torch.int32)):
            assert torch.equal(cpu.gumbel_noise(3, ids, step, 50), expected)


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_codes_are_the_reference_codes(settings: dict, guided: bool):
    ids = torch.arange(5)
    # Multiples of 1/8 tie often, also at the threshold of top-k.
    logits, uncond = ((random(5, 4000, seed=s) * 8).round() / 8 for s in (1, 2))
    if guided:
        settings = {**settings, "uncond_logits": uncond, "cfg_scale": 1.5}
    for step in range(8):
        expected = reference.sample_token(logits, ids, step, seed=11, **settings)
        with vfmtok_fast.enable("sample_token", strict=True):
            assert torch.equal(ops.sample_token(logits, ids, step, seed=11, **settings), expected)
            assert vfmtok_fast.status().ops["sample_token"].calls == {"cpu": 1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype):
    logits, ids = random(4, 3000).to(dtype), torch.arange(4)
    expected = reference.sample_token(logits, ids, 2, top_k=50, seed=5)
    assert torch.equal(cpu.sample_token(logits, ids, 2, top_k=50, seed=5), expected)


def test_inputs_are_left_as_they_were():
    logits, uncond, ids = random(3, 500), random(3, 500, seed=1), torch.arange(3)
    before = logits.clone(), uncond.clone(), ids.clone()
    cpu.sample_token(logits, ids, 1, uncond_logits=uncond, cfg_scale=2.0, top_k=9, top_p=0.5)
    for now, then in zip((logits, uncond, ids), before, strict=True):
        assert torch.equal(now, then)


def test_an_empty_batch():
    codes = cpu.sample_token(random(0, 10), torch.arange(0), 0)
    assert codes.shape == (0,) and codes.dtype == torch.int64


def test_a_wrong_key_schedule_is_seen(monkeypatch: pytest.MonkeyPatch):
    """A single wrong constant fails the tests of the bits, so they prove something."""
    monkeypatch.setattr(cpu, "_KEY_STEPS", (0x9E3779B9, 0xBB67AE84))
    with pytest.raises(AssertionError):
        test_noise_has_the_reference_bits(1, 7)


@pytest.mark.parametrize("first", [False, True])
def test_calls_in_and_outside_inference_mode(first: bool):
    """Both modes share one cached workspace; no other test uses this size."""
    logits = random(2, 1237 + first)
    want = reference.sample_token(logits, IDS[:2], 3)
    for mode in (first, not first, first):
        with torch.inference_mode(mode), vfmtok_fast.enable("sample_token", strict=True):
            assert torch.equal(ops.sample_token(logits, IDS[:2], 3), want)
