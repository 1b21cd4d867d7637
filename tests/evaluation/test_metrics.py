"""Each metric against formulas written another way, and against libraries that have it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from vfmtok_fast.evaluation import metrics
from vfmtok_fast.evaluation.metrics import (  # fmt: skip
    Moments,
    frechet_distance,
    inception_score,
    precision_recall,
    psnr,
    ssim,
)


def activations(count: int, size: int = 24, seed: int = 0) -> np.ndarray:
    """Return float32 features that are correlated and not centred, like pool_3."""
    draw = np.random.default_rng(seed)
    mixed = draw.normal(size=(count, size)) @ draw.normal(size=(size, size)) / 5
    return np.maximum(mixed + 0.4, 0).astype(np.float32)


def statistics(features: np.ndarray, batch: int = 13) -> metrics.Statistics:
    moments = Moments()
    for part in torch.from_numpy(features).split(batch):
        moments.add(part)
    return moments.statistics()


def test_moments_are_numpys():
    x = activations(100)
    found = statistics(x)
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-10)
    assert found.count == 100
    with pytest.raises(ValueError, match="at least 2 pictures, got 1"):
        statistics(x[:1])


def test_fid_is_the_formula_with_a_matrix_root():
    x, y = activations(200), activations(150, seed=1)
    a, b = (np.cov(z, rowvar=False) for z in (x, y))
    step = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
    expected = step @ step + np.trace(a) + np.trace(b) - 2 * np.trace(linalg.sqrtm(a @ b)).real
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(statistics(x), statistics(x)) == pytest.approx(0, abs=1e-9)


def test_fid_of_fewer_pictures_than_features():
    """FID matches the value from the small matrix of inner products, without empty directions."""
    x, y = activations(9, size=64), activations(6, size=64, seed=1)
    centred = [(z - z.mean(0, dtype=np.float64)) / math.sqrt(len(z) - 1) for z in (x, y)]
    step = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = step @ step + sum((c**2).sum() for c in centred) - 2 * root
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(expected, rel=1e-9)


def test_inception_score_of_splits():
    logits = activations(25, size=10) * 3
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    scores = []
    for part in (p[:10], p[10:20], p[20:]):
        kl = part * (np.log(part) - np.log(part.mean(0)))
        scores.append(np.exp(kl.sum(1).mean()))
    found = inception_score(torch.from_numpy(logits), split=10)
    assert found == pytest.approx(np.mean(scores), rel=1e-12)
    # A probability of 0 adds nothing, where ADM's float32 gives NaN.
    assert inception_score(torch.tensor([[1000.0, 0], [0, 1000.0]])) == pytest.approx(2)


def by_hand(reference: np.ndarray, samples: np.ndarray, distance, k: int = 3):
    """Return precision and recall, computed point by point."""

    def inside(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = [sorted(distance(x, y) for y in manifold)[k] for x in manifold]
        hits = [any(distance(p, m) <= r for m, r in zip(manifold, radii)) for p in points]  # noqa: B905
        return sum(hits) / len(hits)

    return inside(samples, reference), inside(reference, samples)


def exact(u: np.ndarray, v: np.ndarray) -> float:
    return float(np.square(u.astype(np.float64) - v).sum())


def rounded(u: np.ndarray, v: np.ndarray) -> np.float16:
    """Return ADM's distance: steps round to float16, sums inside them are wider."""
    u, v = u.astype(np.float16), v.astype(np.float16)
    norms = [np.float16(np.square(z).astype(np.float32).sum()) for z in (u, v)]
    product = np.float16((u.astype(np.float64) * v.astype(np.float64)).sum())
    return max(np.float16(np.float16(norms[0] - 2 * product) + norms[1]), np.float16(0))


@pytest.mark.parametrize("half", [False, True], ids=["float64", "as ADM"])
def test_precision_and_recall(half: bool, monkeypatch):
    monkeypatch.setattr(metrics, "ROWS", 7)
    x, y = activations(30, size=4), activations(22, size=4, seed=1)
    expected = by_hand(x, y, rounded if half else exact)
    found = precision_recall(torch.from_numpy(x), torch.from_numpy(y), half=half)
    assert found == pytest.approx(expected, abs=1e-12) and 0 < found[0] < 1 and 0 < found[1] < 1
    # Values too large for float16 do not overflow.
    large = torch.from_numpy(x) * 200, torch.from_numpy(y) * 200
    assert precision_recall(*large, half=True) == pytest.approx(by_hand(x, y, exact))
    with pytest.raises(ValueError, match="more than k = 3 pictures of each, got 30 and 3"):
        precision_recall(torch.from_numpy(x), torch.from_numpy(y[:3]))


def test_torch_fidelity_has_the_same_figures():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = activations(200), activations(160, seed=1)
    theirs = [
        {"mu": z.mean.numpy(), "sigma": z.covariance.numpy()} for z in map(statistics, (x, y))
    ]
    (expected,) = fid.fid_statistics_to_metric(*theirs, verbose=False).values()
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(expected, rel=1e-6)

    expected = isc_features_to_metric(torch.from_numpy(x), splits=4, shuffle=False)
    found = inception_score(torch.from_numpy(x), split=50)
    assert found == pytest.approx(expected["inception_score_mean"], rel=1e-6)

    pair = torch.from_numpy(x[:, :4]).double(), torch.from_numpy(y[:, :4]).double()
    settings = {"prc_neighborhood": 3, "prc_batch_size": 64, "save_cpu_ram": False}
    expected = prc_features_to_metric(pair[1], pair[0], **settings, verbose=False)
    found = precision_recall(*pair)
    assert found == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


@pytest.fixture
def pair(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smooth images, not square, in two versions that differ a little."""
    smooth = pictures[:3, :20, :17].astype(np.float64).cumsum(2) / 40
    noise = np.random.default_rng(1).normal(0, 9, smooth.shape)
    return smooth.clip(0, 255).astype(np.uint8), (smooth + noise).clip(0, 255).astype(np.uint8)


def test_psnr_and_ssim_by_hand(pair):
    a, b = (z.astype(np.float64) / 255 for z in pair)
    expected = [-10 * math.log10(np.square(x - y).mean()) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(*pair), expected, rtol=1e-12)
    assert psnr(pair[0], pair[0]).isinf().all()

    def windows(z: np.ndarray) -> np.ndarray:
        return np.lib.stride_tricks.sliding_window_view(z, (7, 7), axis=(1, 2)).reshape(
            3, 14, 11, 3, 49
        )

    for data_range in (1.0, 2.0):
        x, y = windows(a), windows(b)
        mx, my = x.mean(-1), y.mean(-1)
        cov = ((x - mx[..., None]) * (y - my[..., None])).sum(-1) / 48
        c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
        top = (2 * mx * my + c1) * (2 * cov + c2)
        bottom = (mx**2 + my**2 + c1) * (x.var(-1, ddof=1) + y.var(-1, ddof=1) + c2)
        expected = (top / bottom).mean((1, 2, 3))
        np.testing.assert_allclose(ssim(*pair, data_range), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="at least 7 pixels a side, got 6x20"):
        ssim(pair[0][:, :, :6], pair[1][:, :, :6])
    with pytest.raises(TypeError, match="must be uint8, got torch.float64"):
        psnr(a, b)


def test_psnr_and_ssim_are_scikit_images(pair):
    theirs = pytest.importorskip("skimage.metrics")
    for number, (x, y) in enumerate(zip(*(z / 255 for z in pair), strict=True)):
        expected = theirs.peak_signal_noise_ratio(x, y, data_range=1)
        assert float(psnr(*pair)[number]) == pytest.approx(expected, abs=1e-6)
        for data_range in (1.0, 2.0):
            expected = theirs.structural_similarity(x, y, data_range=data_range, channel_axis=-1)
            assert float(ssim(*pair, data_range)[number]) == pytest.approx(expected, abs=1e-6)
