"""The noise of sample_token: Philox 4x32-10 as published and as in Triton, and Gumbel from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from scipy import stats

from vfmtok_fast.reference.philox import gumbel_noise, philox

SEEDS = (0, 1, 2**31, 2**32 + 5, 2**63 + 11, 2**64 - 1)


def words(seed: int, counter: tuple[int, int, int, int]) -> int:
    return int(philox(seed, *(torch.tensor(c) for c in counter)))


@pytest.mark.parametrize(
    ("counter", "key", "first"),
    [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            0xD16CFE09,
        ),
    ],
)
def test_known_answers(counter, key, first):
    """The first words of `kat_vectors` for philox4x32 10 in the Random123 distribution."""
    assert words(key[0] | key[1] << 32, counter) == first


def python_philox(seed: int, counter: list[int]) -> int:
    """Salmon et al. 2011, section 3.3, in Python integers."""
    key, mask = [seed % 2**32, seed >> 32], 2**32 - 1
    for _ in range(10):
        left, right = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            right >> 32 ^ counter[1] ^ key[0], right & mask,
            left >> 32 ^ counter[3] ^ key[1], left & mask,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter[0]


def counters(n: int) -> np.ndarray:
    """Return random counters [n, 4], some at the edges of the 32-bit range."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 2**32, (n, 4))
    edges = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1])
    return np.where(rng.random((n, 4)) < 0.3, rng.choice(edges, (n, 4)), drawn)


@pytest.mark.parametrize("seed", SEEDS)
def test_matches_whole_numbers(seed):
    drawn = counters(200)
    got = philox(seed, *torch.from_numpy(drawn).unbind(1))
    assert got.tolist() == [python_philox(seed, row) for row in drawn.tolist()]


def test_matches_triton(tmp_path):
    """Kernels draw the same words with `tl.philox`, and `tl.rand` is derived from them."""
    pytest.importorskip("triton")
    script = tmp_path / "draw.py"
    script.write_text(
        textwrap.dedent("""
        import json, sys
        import torch, triton
        import triton.language as tl

        @triton.jit
        def kernel(seed, counters, out, rand, N: tl.constexpr):
            i = tl.arange(0, N)
            c0 = tl.load(counters + i).to(tl.uint32)
            c1 = tl.load(counters + N + i).to(tl.uint32)
            c2 = tl.load(counters + 2 * N + i).to(tl.uint32)
            c3 = tl.load(counters + 3 * N + i).to(tl.uint32)
            word, _, _, _ = tl.philox(seed, c0, c1, c2, c3)
            tl.store(out + i, word.to(tl.int64))
            tl.store(rand + i, tl.rand(seed, c0))

        task = json.load(sys.stdin)
        counters = torch.tensor(task["counters"]).T.contiguous()
        n = counters.shape[1]
        result = []
        for seed in task["seeds"]:
            out, rand = torch.zeros(n, dtype=torch.int64), torch.zeros(n)
            kernel[(1,)](seed, counters, out, rand, n)
            result.append([[w % 2**32 for w in out.tolist()], rand.tolist()])
        print(json.dumps(result))
        """)
    )
    drawn = counters(64)
    # Triton passes a seed as a signed or unsigned 64-bit number and keeps all 64 bits.
    done = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps({"seeds": SEEDS, "counters": drawn.tolist()}),
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    columns = torch.from_numpy(drawn).unbind(1)
    zero = torch.zeros_like(columns[0])
    for seed, (theirs, rand) in zip(SEEDS, json.loads(done.stdout), strict=True):
        assert philox(seed, *columns).tolist() == theirs, seed
        # tl.rand(seed, i) folds the word at counter (i, 0, 0, 0) to 31 bits.
        word = philox(seed, columns[0], zero, zero, zero)
        signed = torch.where(word >= 2**31, word - 2**32, word)
        folded = torch.where(signed < 0, -signed - 1, signed).double() * 4.6566127342e-10
        # Float32 rounds the integer, the factor and the product.
        np.testing.assert_allclose(rand, folded.numpy(), rtol=1.5 * 2**-23)


def exact_gumbel(seed: int, ids: list[int], step: int, V: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the float64 noise from integer Philox, and how far float32 may be from it."""
    word = np.array(
        [[python_philox(seed, [v, step, i % 2**32, i >> 32]) for v in range(V)] for i in ids]
    )
    u = (word + 0.5) * 2.0**-32
    e = -np.log1p(-u)
    noise = -np.log(e)
    eps = 2.0**-23
    # u is rounded by eps/2 relative, or clamped to 1 - 2^-24. That moves E by 1 / (1 - u) times as
    # much, and E in turn moves -log E by 1 / E. Then both logarithms and E are rounded, 1 ulp each.
    moved = (eps * u + 2.0**-24 * (u > 1 - 2.0**-24)) / np.maximum(1 - u, 2.0**-24)
    return noise, (moved + 2 * eps * e) / e + eps * np.maximum(np.abs(noise), 1)


def test_noise_is_gumbel_of_the_keyed_word():
    ids = [0, 3, 2**32, 2**35 + 7]
    got = gumbel_noise(2**40 + 3, torch.tensor(ids), 255, 2000)
    assert got.dtype == torch.float32 and got.shape == (4, 2000)
    want, bound = exact_gumbel(2**40 + 3, ids, 255, 2000)
    assert np.all(np.abs(got.double().numpy() - want) <= bound)
    assert np.median(bound) < 1e-6


def test_noise_follows_the_gumbel_law():
    noise = gumbel_noise(7, torch.arange(100), 0, 2000).flatten().double().numpy()
    assert stats.kstest(noise, stats.gumbel_r.cdf).pvalue > 1e-4
    # Adjacent codes, images and steps, which differ in one bit of the counter.
    grid = noise.reshape(100, 2000)
    other = gumbel_noise(7, torch.arange(100), 1, 2000).double().numpy()
    pairs = [(grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:]), (grid, other)]
    for a, b in pairs:
        assert stats.spearmanr(a.ravel(), b.ravel()).pvalue > 1e-4


def test_the_extremes_of_the_word_are_finite(monkeypatch):
    """u must reach neither 0 nor 1, where the noise would be infinite."""
    import vfmtok_fast.reference.philox as module

    extremes = torch.tensor([[0, 1, 2**32 - 1, 2**32 - 128, 2**31]])
    monkeypatch.setattr(module, "philox", lambda *args: extremes)
    noise = gumbel_noise(0, torch.zeros(1, dtype=torch.int64), 0, 5)[0]
    assert torch.isfinite(noise).all()
    # The smallest word has the largest noise, and the largest word the smallest.
    assert noise.argmax() == 0 and noise.min() == noise[2]
    assert float(noise[0]) == pytest.approx(33 * np.log(2), rel=1e-6)


@pytest.mark.parametrize("V", [1, 7, 64, 1001])
def test_noise_of_an_image_does_not_depend_on_its_batch(V):
    ids = torch.tensor([4, 2**33, 0, 9, 1])
    together = gumbel_noise(3, ids, 17, V)
    order = torch.tensor([2, 0, 4, 1, 3])
    assert torch.equal(gumbel_noise(3, ids[order], 17, V), together[order])
    for row in range(5):
        assert torch.equal(gumbel_noise(3, ids[row : row + 1], 17, V)[0], together[row])
    # Nor does a code's noise depend on how many codes there are.
    assert torch.equal(gumbel_noise(3, ids, 17, 2 * V)[:, :V], together)


@pytest.mark.gpu
def test_words_are_the_same_on_the_gpu():
    ids = torch.tensor([4, 2**33, 0])
    columns = torch.from_numpy(counters(1000)).unbind(1)
    for seed in SEEDS:
        there = philox(seed, *(c.cuda() for c in columns)).cpu()
        assert torch.equal(there, philox(seed, *columns))
    there = gumbel_noise(5, ids.cuda(), 3, 500).cpu().double().numpy()
    want, bound = exact_gumbel(5, ids.tolist(), 3, 500)
    assert np.all(np.abs(there - want) <= 2 * bound)
