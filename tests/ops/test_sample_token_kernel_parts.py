"""Parts of Triton's sample_token: its noise, and what its filters keep."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from where_kernels_run import DEVICE, GPU, in_the_interpreter, runs

from vfmtok_fast.functional import filter_logits
from vfmtok_fast.reference.philox import gumbel_noise, philox

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from vfmtok_fast.kernels.sample_token import (  # noqa: E402
    HOPELESS,
    _filters,
    _gumbel,
    _philox,
    _signed,
)

pytestmark = pytest.mark.usefixtures("poison")
SEEDS = (0, 1, 2**31, 2**32 + 5, 2**63 + 11, 2**64 - 1)
# Largest error of the noise over all possible u, in units of max(1, |noise|):
# kernels/sample_token.md, "Noise".
NOISE_ERROR = 3.5 * 2.0**-24
# Uncertainty of the mass before a code, relative to the total; kernels/sample_token.md, "Filters".
MASS_ERROR = 9 * 2.0**-20


test_in_the_interpreter = in_the_interpreter(__file__)


def random(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@triton.jit(do_not_specialize=["low", "high", "step"])
def _draw_noise(low, high, image_ids, step, words, noise, CODES: tl.constexpr, ROWS: tl.constexpr):
    row, code = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, CODES)
    image = tl.load(image_ids + row)[:, None]
    c0, c1 = code[None, :].to(tl.uint32), step.to(tl.uint32)
    word = _philox(
        low.to(tl.uint32),
        high.to(tl.uint32),
        c0,
        c1,
        image.to(tl.uint32),
        (image >> 32).to(tl.uint32),
    )
    place = row[:, None] * CODES + code[None, :]
    tl.store(words + place, word.to(tl.int64))
    tl.store(noise + place, _gumbel(word))


def made_noise(seed: int, ids: Tensor, step: int, V: int) -> tuple[Tensor, Tensor]:
    words = torch.empty(len(ids), V, dtype=torch.int64, device=DEVICE)
    noise = torch.empty(len(ids), V, device=DEVICE)
    numbers = (_signed(word) for word in (seed, seed >> 32))
    # The interpreter runs programs one after another, so it gets only one.
    rows = max(1, 2048 // V) if GPU else len(ids)
    _draw_noise[(len(ids) // rows,)](
        *numbers, ids.to(DEVICE), step, words, noise, CODES=V, ROWS=rows, enable_fp_fusion=False
    )
    return words.cpu(), noise.cpu()


@runs
@pytest.mark.parametrize("seed", SEEDS)
def test_noise_is_that_of_the_reference(seed: int, exact_gumbel):
    ids, V = torch.tensor([0, 2**32 - 1, 2**40 + 7, -1]), 4096
    words, noise = made_noise(seed, ids, 7, V)
    wide = ids[:, None]
    halves = wide % 2**32, (wide >> 32) % 2**32
    assert torch.equal(words, philox(seed, torch.arange(V)[None], torch.tensor(7), *halves))
    truth, ruler = exact_gumbel(words), gumbel_noise(seed, ids, 7, V)
    size = truth.abs().clamp(min=1)
    error, allowed = ((x.double() - truth).abs() / size for x in (noise, ruler))
    assert float(error.max()) <= min(NOISE_ERROR, 2 * float(allowed.max()) + 2.0**-24)


@triton.jit
def _noise_of(words, noise, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(noise + o, _gumbel(tl.load(words + o).to(tl.uint32)))


@runs
def test_noise_of_the_smallest_and_largest_words(exact_gumbel):
    """The tail decides samples, so it must be right relative to E, down to E = 2^-33."""
    near = torch.arange(512)
    edges = [near, 2**32 - 1 - near, *(2**k - 256 + near for k in range(9, 32))]
    # Around u = 1/3 and 2/3, where the reduction changes.
    edges += [round(2**32 * k / 3) - 256 + near for k in (1, 2)]
    word = torch.cat(edges)
    word = torch.cat([word, word[: 2**14 - len(word)]])
    noise = torch.empty(len(word), device=DEVICE)
    _noise_of[(16,)](word.to(DEVICE), noise, N=1024, enable_fp_fusion=False)
    truth = exact_gumbel(word)
    error = (noise.cpu().double() - truth).abs() / truth.abs().clamp(min=1)
    assert float(error.max()) <= NOISE_ERROR
    assert noise.argmax() == 0 and float(truth.max() - truth.min()) < HOPELESS.value - 6


@runs
def test_noise_draws_the_softmax_law(check_law):
    """One program makes 2^17 draws: as many calls would take the interpreter an hour."""
    logits = torch.tensor([0.5, 1.25, -0.5, 0.5, 2.0, 0.5, -1.0, 0.0])
    _, noise = made_noise(11, torch.arange(2**17), 5, len(logits))
    check_law((logits + noise).argmax(-1).cpu(), logits.double().softmax(-1))


@triton.jit(do_not_specialize=["top_k"])
def _thresholds(logits, values, codes, top_k, top_p, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    value, code = _filters(logits + row * V, None, None, None, top_k, top_p, V, BLOCK)
    tl.store(values + row, value)
    tl.store(codes + row, code)


def check_kept(
    logits: Tensor, top_k: int, top_p: float, told: tuple[int, float] | None = None
) -> int:
    """Check that the filters keep what the reference keeps, except codes that cannot be drawn.

    ``told`` gives the kernel other settings, to prove that this check detects them. Returns how
    many codes have a mass before them so close to top_p that keeping or dropping them is right.
    """
    B, V = logits.shape
    values = torch.empty(B, device=DEVICE)
    codes = torch.empty(B, dtype=torch.int32, device=DEVICE)
    k, p = told or (top_k, top_p)
    k, p = k if 0 < k < V else None, p if p < 1 else None
    block = triton.next_power_of_2(V)
    _thresholds[(B,)](logits.to(DEVICE), values, codes, k, p, V=V, BLOCK=block)
    values, codes = values.cpu()[:, None], codes.cpu()[:, None]
    kept = (logits > values) | ((logits == values) & (torch.arange(V) <= codes))
    ordered, order = filter_logits(logits, top_k, 1.0).double().sort(descending=True, stable=True)
    mass = ordered.softmax(-1)
    before = torch.zeros_like(mass).scatter(1, order, mass.cumsum(-1) - mass)
    close = ((before - top_p).abs() <= MASS_ERROR) & (top_p < 1)
    matters = (logits >= logits.amax(-1, keepdim=True) - HOPELESS.value) & ~close
    expected = filter_logits(logits, top_k, 1.0) > float("-inf")
    expected &= (before <= top_p) | (top_p == 1)
    assert torch.equal(kept & matters, expected & matters)
    return int(close.sum())


@runs
@given(
    B=st.integers(1, 3), V=st.integers(1, 300), seed=st.integers(0, 2**31),
    steps=st.sampled_from([0.5, 2, 8, 1e6]), spread=st.sampled_from([1e-3, 1.0, 10.0, 1e5]),
    shift=st.sampled_from([0.0, -3.0, 1e4]), top_k=st.integers(0, 40),
    top_p=st.sampled_from([1e-6, 0.05, 0.5, 0.77, 0.95, 0.9999, 1.0]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_what_is_kept(B, V, seed, steps, spread, shift, top_k, top_p):
    """Coarse logits tie often, also at the thresholds."""
    logits = ((random(B, V, seed=seed) * steps).round() / steps) * spread + shift
    close = check_kept(logits, top_k, top_p)
    # Equal codes whose number times top_p is an integer; all codes of the tail if top_p is near
    # one.
    assert close <= B or top_p > 0.999


@runs
def test_all_ties_at_top_k_are_kept_and_those_of_the_nucleus_in_order():
    zeros = torch.zeros(1, 1000)
    zeros[0, 500:] = -0.0
    check_kept(zeros, 3, 1.0)
    check_kept(zeros, 0, 0.5005)
    check_kept(zeros - 2.5, 0, 1e-6)
    high = torch.cat([zeros + 1, zeros], 1)
    check_kept(high, 1200, 0.9)
    # 1000 codes with e times the weight of the others: the first 633 of them.
    check_kept(high, 0, 633 / 1000 * math.e / (1 + math.e) - 1e-4)
    tiny = torch.zeros(1, 40)
    tiny[0, ::2] = 1e-45 * torch.arange(20)
    check_kept(tiny, 5, 1.0)


@runs
def test_a_wrong_filter_is_seen():
    """With wrong settings the check fails, so the tests above prove something."""
    for asked, told in (((10, 1.0), (9, 1.0)), ((0, 0.8), (0, 0.79))):
        with pytest.raises(AssertionError):
            check_kept(random(2, 100), *asked, told=told)
