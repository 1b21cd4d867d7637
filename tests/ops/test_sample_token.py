"""sample_token: its filters, and that its draws follow the softmax law."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import vfmtok_fast
from vfmtok_fast.functional import filter_logits
from vfmtok_fast.ops import sample_token

DRAWS = 100_000
# All seeds are fixed, so a run never fails by chance. A correct sampler would fail with one seed in
# 10^5, so the seed that was written down is very unlikely to fail.
P_VALUE = 1e-5


def ids(n: int) -> Tensor:
    return torch.arange(n)


def law(
    logits: np.ndarray,
    uncond: np.ndarray | None = None,
    cfg_scale: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> np.ndarray:
    """Return probabilities of [V] logits in float64, by loops over codes sorted by size."""
    logits = logits.astype(np.float64)
    if uncond is not None:
        logits = uncond + cfg_scale * (logits - uncond)
    weights = np.exp((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    kept = list(order)
    if 0 < top_k < len(order):
        kept = [code for code in order if logits[code] >= logits[order[top_k - 1]]]
    total, mass, nucleus = weights[kept].sum(), 0.0, []
    for code in kept:
        nucleus.append(code)
        mass += weights[code] / total
        if mass > top_p:
            break
    probabilities = np.zeros(len(logits))
    probabilities[nucleus] = weights[nucleus] / weights[nucleus].sum()
    return probabilities


# Three codes tie at the threshold of top_k=3: the third, fourth and fifth largest.
TIES = np.array([0.3, 1.2, -0.5, 0.3, 2.0, 0.3, -1.0, 0.1], np.float32)
SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top-k with ties": {"top_k": 3},
    "top-k of one": {"top_k": 1},
    "top-k of all": {"top_k": 8},
    "top-k past all": {"top_k": 800},
    "top-p": {"top_p": 0.7},
    "top-p splits a tie": {"top_p": 0.75},
    "top-p of next to nothing": {"top_p": 1e-6},
    "top-k before top-p": {"top_k": 2, "top_p": 0.6, "temperature": 2.0},
    "everything": {"top_k": 6, "top_p": 0.8, "temperature": 1.3},
}


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_law(name, guided, check_law):
    settings = dict(SETTINGS[name])
    extra = {}
    uncond = None
    if guided:
        # Multiples of 1/8, so guidance by 1.5 keeps the ties exact.
        uncond = np.array([1.0, 0.5, 0.25, 1.0, 0.0, 1.0, 0.5, -0.25], np.float32)
        extra["uncond_logits"] = torch.from_numpy(uncond).expand(DRAWS, -1)
        settings["cfg_scale"] = 1.5
    logits = (TIES * 8).round() / 8 if guided else TIES
    codes = sample_token(
        torch.from_numpy(logits).expand(DRAWS, -1), ids(DRAWS), 5, seed=11, **settings, **extra
    )
    assert codes.dtype == torch.int64 and codes.shape == (DRAWS,)
    check_law(codes, law(logits, uncond, **settings))


def test_the_law_test_tells_top_k_ties_apart(check_law):
    """The test detects a sampler that keeps 3 codes where ties make top_k=3 keep 5."""
    wrong = np.zeros(8)
    wrong[[4, 1, 0]] = law(TIES)[[4, 1, 0]]
    codes = np.random.default_rng(0).choice(8, DRAWS, p=wrong / wrong.sum())
    with pytest.raises(AssertionError):
        check_law(torch.from_numpy(codes), law(TIES, top_k=3))


def test_the_law_test_of_one_code_is_exact(check_law):
    """If one code is left, every draw must be that code; a single other draw is detected."""
    one = np.array([0.0, 1.0, 0.0])
    codes = torch.ones(100, dtype=torch.int64)
    check_law(codes, one)
    for wrong in (0, 2, 3):
        codes[50] = wrong
        with pytest.raises(AssertionError):
            check_law(codes, one)
    with pytest.raises(AssertionError):
        check_law(codes[:0], one)


@pytest.mark.parametrize("settings", [{}, {"top_k": 100, "top_p": 0.95}], ids=str)
def test_a_wide_law(settings, check_law):
    """Many codes, most of them rare, drawn in 100 steps for 200 images."""
    logits = np.random.default_rng(1).normal(size=257).astype(np.float32) * 1.5
    rows = torch.from_numpy(logits).expand(200, -1)
    codes = [sample_token(rows, ids(200), step, seed=3, **settings) for step in range(100)]
    check_law(torch.cat(codes), law(logits, **settings))


@pytest.mark.parametrize(
    "other", [{"step": 8}, {"seed": 2}, {"shift": 1}, {"shift": 2**32}], ids=str
)
def test_draws_of_other_steps_seeds_and_images_are_independent(other):
    logits = torch.from_numpy(TIES).expand(DRAWS, -1)
    table = np.zeros((8, 8))
    first = sample_token(logits, ids(DRAWS), 7, seed=1)
    second = sample_token(
        logits, ids(DRAWS) + other.get("shift", 0), other.get("step", 7), seed=other.get("seed", 1)
    )
    assert not torch.equal(first, second)
    np.add.at(table, (first.numpy(), second.numpy()), 1)
    assert stats.chi2_contingency(table).pvalue > P_VALUE


def test_a_draw_does_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 301, generator=generator)
    names = torch.tensor([5, 0, 2**40 + 1, 7, 3, 2**32, 1])
    together = sample_token(logits, names, 3, seed=9)
    order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
    assert torch.equal(sample_token(logits[order], names[order], 3, seed=9), together[order])
    for row in range(7):
        alone = sample_token(logits[row : row + 1], names[row : row + 1], 3, seed=9)
        assert alone.item() == together[row]
    assert len(set(together.tolist())) > 3


def test_step_and_image_ids_in_every_form():
    logits = torch.zeros(3, 50)
    want = sample_token(logits, ids(3), 200, seed=1)
    for step in (torch.tensor(200), torch.tensor([200]), torch.tensor([[200]], dtype=torch.int32)):
        assert torch.equal(sample_token(logits, ids(3), step, seed=1), want)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(sample_token(logits, ids(3).to(dtype), 200, seed=1), want)


@pytest.mark.parametrize("seed", [0, 2**32 + 7, 2**63 + 5, 2**64 - 1])
def test_a_seed_may_be_a_tensor(seed):
    logits = torch.zeros(3, 50)
    want = sample_token(logits, ids(3), 200, seed=seed)
    signed = torch.tensor(seed - 2**64 * (seed >= 2**63))
    for form in (signed, signed[None]):
        assert torch.equal(sample_token(logits, ids(3), 200, seed=form), want)
        with vfmtok_fast.enable("sample_token", strict=True):
            assert torch.equal(sample_token(logits, ids(3), 200, seed=form), want)


def test_greedy_takes_the_guided_maximum_and_the_lowest_code_on_ties():
    logits = torch.tensor([[0.0, 1.0, 3.0, 3.0], [2.0, 2.0, 1.0, 0.0]])
    uncond = torch.tensor([[0.0, 0.0, 3.0, 2.0], [2.0, 2.0, 0.0, 0.0]])
    names = ids(2)
    assert sample_token(logits, names, 0, greedy=True).tolist() == [2, 0]

    def guided(scale: float) -> list[int]:
        return sample_token(
            logits, names, 0, uncond_logits=uncond, cfg_scale=scale, greedy=True
        ).tolist()

    assert guided(1.0) == [2, 0]
    assert guided(0.0) == [2, 0]  # Unconditional.
    assert guided(1.5) == [3, 0]  # 3, 1.5; 3, 3.5 and 2, 2, 1.5, 0.
    assert guided(4.0) == [3, 2]  # 0, 4, 3, 6 and 2, 2, 4, 0.
    assert guided(-3.0) == [2, 0]


def test_greedy_ignores_noise_and_filters():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    want = logits.argmax(-1)
    for seed in range(3):
        got = sample_token(logits, ids(5), seed, greedy=True, seed=seed, top_k=2, temperature=9.0)
        assert torch.equal(got, want)


def test_temperature_zero_is_greedy():
    logits = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    got = sample_token(logits, ids(200), 0, temperature=0.0)
    # Temperature 0 acts as 1e-5, where a code 1e-3 below the best has exp(-100) of its probability.
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert clear.sum() > 150
    assert torch.equal(got[clear], logits.argmax(-1)[clear])


def kept(logits: list[float], top_k: int = 0, top_p: float = 1.0) -> list[int]:
    rows = torch.tensor([logits])
    filtered = filter_logits(rows, top_k, top_p)
    assert torch.all((filtered == rows) | (filtered == -math.inf))
    return torch.isfinite(filtered[0]).nonzero()[:, 0].tolist()


LOGS = [math.log(p) for p in (0.125, 0.5, 0.25, 0.0625, 0.0625)]


@pytest.mark.parametrize(
    ("top_p", "codes"),
    [
        (0.01, [1]), (0.49, [1]), (0.51, [1, 2]), (0.74, [1, 2]), (0.76, [0, 1, 2]),
        (0.874, [0, 1, 2]), (0.876, [0, 1, 2, 3]), (0.93, [0, 1, 2, 3]),  # The lower code of a tie.
        (0.95, [0, 1, 2, 3, 4]), (1.0, [0, 1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_top_p_keeps_the_first_code_past_the_threshold(top_p, codes):
    assert kept(LOGS, top_p=top_p) == codes


def test_top_p_takes_equal_codes_in_order():
    # 500 of 1000 codes reach 0.5; how the sum rounds decides whether one more is kept.
    codes = kept([0.25] * 1000, top_p=0.5)
    assert codes == list(range(len(codes))) and len(codes) in (500, 501)


@pytest.mark.parametrize(
    ("top_k", "codes"),
    [(1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3, 4]), (5, [0, 1, 2, 3, 4]), (9, None)],
)
def test_top_k_keeps_ties(top_k, codes):
    assert kept(LOGS, top_k=top_k) == (list(range(5)) if codes is None else codes)


def test_top_p_counts_among_what_top_k_left():
    # Of 0.5 and 0.25 alone, the first has 2/3.
    assert kept(LOGS, top_k=2, top_p=0.6) == [1]
    assert kept(LOGS, top_p=0.6) == [1, 2]


def test_wide_and_narrow_logits():
    names = ids(4)
    values = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        half = values.to(dtype)
        assert torch.equal(sample_token(half, names, 1), sample_token(half.float(), names, 1))
    # A difference that float32 would lose decides.
    fine = torch.tensor([[1.0, 1.0 + 1e-12, 1.0]], dtype=torch.float64)
    assert sample_token(fine, names[:1], 0, greedy=True).item() == 1
    assert sample_token(fine, names[:1], 0, top_k=1).item() == 1
    same = torch.ones_like(fine)
    guided = sample_token(
        same, names[:1], 0, uncond_logits=2 - fine, cfg_scale=2.0, greedy=True
    )  # Guidance doubles the difference from `fine`'s mirror image.
    assert guided.item() == 1


LOGITS = torch.zeros(2, 8)
NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": LOGITS[0]}, ValueError, r"logits must have shape \[B, V\], got \(8,\)"),
        ({"logits": LOGITS[:, :0]}, ValueError, "logits must have at least one code"),
        ({"logits": LOGITS.long()}, TypeError, "logits must be floating point, got torch.int64"),
        ({"logits": LOGITS.tolist()}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"image_ids": ids(3)}, ValueError, r"image_ids must have shape \(2,\), got \(3,\)"),
        (
            {"image_ids": ids(2)[None]},
            ValueError,
            r"image_ids must have shape \(2,\), got \(1, 2\)",
        ),
        (
            {"image_ids": ids(2).float()},
            TypeError,
            "image_ids must hold integers, got torch.float32",
        ),
        ({"image_ids": [0, 1]}, TypeError, "image_ids must be a torch.Tensor, got list"),
        ({"image_ids": ids(2).to("meta")}, ValueError, "image_ids must be on cpu, as logits is"),
        ({"step": -1}, ValueError, r"step must be in \[0, 2\^32\), got -1"),
        ({"step": 1.5}, TypeError, "step must be an int, got float"),
        ({"step": ids(2)}, ValueError, r"step must have 1 elements, got shape \(2,\)"),
        ({"step": torch.tensor(1.0)}, TypeError, "step must hold integers, got torch.float32"),
        ({"step": ids(1).to("meta")}, ValueError, "step must be on cpu, as logits is, got meta"),
        ({"uncond_logits": LOGITS[:1]}, ValueError, r"uncond_logits must have shape \(2, 8\), got"),
        ({"uncond_logits": LOGITS.half()}, TypeError, "uncond_logits must be torch.float32, as"),
        ({"cfg_scale": NAN}, ValueError, "cfg_scale must be finite, got nan"),
        ({"cfg_scale": math.inf}, ValueError, "cfg_scale must be finite, got inf"),
        ({"temperature": -0.1}, ValueError, "temperature must be finite and at least 0, got -0.1"),
        ({"temperature": NAN}, ValueError, "temperature must be finite and at least 0, got nan"),
        ({"top_k": -1}, ValueError, r"top_k must be in \[0, 2\^31\), got -1"),
        ({"top_k": 2.0}, TypeError, "top_k must be an int, got float"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, ValueError, r"top_p must be in \(0, 1\], got 1.01"),
        ({"top_p": NAN}, ValueError, r"top_p must be in \(0, 1\], got nan"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^64\), got -1"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\^64\), got"),
        ({"seed": 0.5}, TypeError, "seed must be an int, got float"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed must hold integers, got torch.float32"),
        ({"seed": ids(1).int()}, TypeError, "seed must be torch.int64, got torch.int32"),
        ({"seed": ids(2)}, ValueError, r"seed must have 1 elements, got shape \(2,\)"),
    ],
)
def test_refuses_in_one_line(change, error, message):
    arguments = {"logits": LOGITS, "image_ids": ids(2), "step": 0} | change
    with pytest.raises(error, match=f"^sample_token: {message}") as caught:
        sample_token(**arguments)
    assert "\n" not in str(caught.value)
