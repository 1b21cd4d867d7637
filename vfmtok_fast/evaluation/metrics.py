"""The metrics, each with its formula and source, in float64 except where a published rule rounds.

The rules of ADM are those of the evaluator that came with arXiv 2105.05233, which is the one behind
published FIDs on ImageNet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a distance matrix at a time. ADM takes 10,000, which changes only the memory.
ROWS = 1000
# Parameters of SSIM.
WINDOW, K1, K2 = 7, 0.01, 0.03


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] (divided by count - 1) of features, float64 on the CPU."""

    mean: Tensor
    covariance: Tensor
    count: int | None = None


class Moments:
    """Statistics of features that arrive in batches and are not kept.

    Source: the pairwise update of Chan, Golub and LeVeque, 1979.
    """

    def __init__(self) -> None:
        self.count, self._mean, self._scatter = 0, None, None

    def add(self, features: Tensor) -> None:
        """Add features [B, D] of any dtype and device."""
        x = features.double()
        mean = x.mean(dim=0)
        centred = x - mean
        scatter = centred.T @ centred
        if self.count:
            step = mean - self._mean
            total = self.count + len(x)
            scatter += self._scatter + torch.outer(step, step) * (self.count * len(x) / total)
            mean = self._mean + step * (len(x) / total)
        self.count, self._mean, self._scatter = self.count + len(x), mean, scatter

    def statistics(self) -> Statistics:
        """Return the statistics of all features added so far.

        Raises:
            ValueError: there are fewer than 2 images, so no covariance.
        """
        if self.count < 2:
            raise ValueError(f"statistics: need at least 2 pictures, got {self.count}")
        return Statistics(self._mean.cpu(), self._scatter.cpu() / (self.count - 1), self.count)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """FID: |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)).

    With A = F F', the nonzero eigenvalues of A B are those of F' B F, which is symmetric. The
    number of nonzero eigenvalues is at most the smaller of both ranks. The others are rounding
    errors, whose roots would add up if there are fewer images than features.

    Args:
        a, b: statistics of the same number of features.

    Raises:
        ValueError: the statistics are of different features.

    Source: arXiv 1706.08500.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"frechet_distance: statistics must be of the same features, got {len(a.mean)} and "
            f"{len(b.mean)}"
        )
    values, vectors = torch.linalg.eigh(a.covariance)
    kept = _not_zero(values)
    factor = vectors[:, kept] * values[kept].sqrt()
    rank = int(_not_zero(torch.linalg.eigvalsh(b.covariance)).sum())
    product = torch.linalg.eigvalsh(factor.T @ b.covariance @ factor)
    roots = product[max(len(product) - rank, 0) :].clamp(min=0).sqrt()
    traces = a.covariance.trace() + b.covariance.trace()
    return float((a.mean - b.mean).square().sum() + traces - 2 * roots.sum())


def _not_zero(eigenvalues: Tensor) -> Tensor:
    """Which of a covariance's eigenvalues, in ascending order, are more than rounding errors."""
    smallest = len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps
    return eigenvalues > eigenvalues[-1].clamp(min=0) * smallest


def inception_score(logits: Tensor, split: int = 5000) -> float:
    """IS: the mean of exp(mean KL(p(y|x) || p(y))) over splits, taken in order.

    Args:
        logits: [N, classes], without a bias, as in ADM's graph.
        split: images per split; the last may have fewer. ADM: 5,000.

    Source: arXiv 1606.03498, with ADM's splits.
    """
    scores = []
    for part in logits.split(split):
        log_p = part.double().log_softmax(dim=1)
        log_mean = torch.logsumexp(log_p, dim=0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_mean)).sum(dim=1).mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(
    reference: Tensor, samples: Tensor, k: int = 3, half: bool = False
) -> tuple[float, float]:
    """Share of samples inside the reference's manifold, and of the reference inside the samples'.

    The manifold of points is the union of balls around them; each ball reaches the point's k-th
    neighbour.

    Args:
        reference, samples: [N, D] and [M, D] features, more than k of each.
        k: 3 in ADM.
        half: round squared distances to float16 as ADM does, which turns near misses into ties.
            Otherwise, or if float16 might overflow, use float64.

    Returns:
        Precision and recall.

    Raises:
        ValueError: there are k points or fewer.

    Source: arXiv 1904.06991.
    """
    if min(len(reference), len(samples)) <= k:
        raise ValueError(
            f"precision_recall: needs more than k = {k} pictures of each, got {len(reference)} "
            f"and {len(samples)}"
        )
    half = half and _fits_half(reference, samples)
    real, made = _Points(reference, half), _Points(samples, half)
    around_real, around_made = real.radii(k), made.radii(k)
    precise = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    recalled = []
    for rows in _rows(len(reference)):
        distances = real.distances(rows, made)
        precise |= (distances <= around_real[rows, None]).any(dim=0)
        recalled.append((distances <= around_made).any(dim=1))
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())


def _rows(count: int) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, count, ROWS)]


def _fits_half(*points: Tensor) -> bool:
    """Whether no term of |u|^2 - 2 u v + |v|^2 can overflow in float16: 2 |u v| <= |u|^2 + |v|^2.

    If one overflows, ADM turns to float32 for the 10,000 rows and columns around it.
    """
    largest = max(float(x.float().square().sum(dim=1).max()) for x in points)
    return 4 * largest < torch.finfo(torch.float16).max


class _Points:
    """Features [N, D] and their squared norms, from which distances are computed."""

    def __init__(self, features: Tensor, half: bool):
        # Products of float16 values are exact in float32, and their sums are rounded once, as on a
        # GPU.
        self.values = features.half().float() if half else features.double()
        self.half = half
        squares = self.values.square()
        self.squares = self._round(self._round(squares).to(squares.dtype).sum(dim=1))

    def _round(self, values: Tensor) -> Tensor:
        return values.half() if self.half else values

    def distances(self, rows: slice, others: _Points) -> Tensor:
        """Squared distances [rows, M] of some points to all others, at least 0."""
        products = self._round(self.values[rows] @ others.values.T)
        return (self.squares[rows, None] - 2 * products + others.squares).clamp(min=0)

    def radii(self, k: int) -> Tensor:
        """Squared distance of each point to its k-th neighbour, not counting the point itself."""
        found = (self.distances(rows, self) for rows in _rows(len(self.values)))
        return torch.cat([part.kthvalue(k + 1, dim=1).values for part in found])


def psnr(x: Tensor | np.ndarray, y: Tensor | np.ndarray) -> Tensor:
    """-10 log10 of the mean squared error of images scaled to [0, 1]; infinite for equal images.

    Args:
        x, y: uint8 [B, H, W, 3].

    Returns:
        float64 [B], in decibels.
    """
    a, b = _planes("psnr", x, y)
    return -10 * (a - b).square().mean(dim=(1, 2, 3)).log10()


def ssim(x: Tensor | np.ndarray, y: Tensor | np.ndarray, data_range: float = 1.0) -> Tensor:
    """Structural similarity with a uniform window of 7, sample covariance, and mean over colours.

    Args:
        x, y: uint8 [B, H, W, 3], at least 7 pixels a side; they are scaled to [0, 1].
        data_range: 1.0 is the range of the scaled images. The authors' script has 2.0, which raises
            SSIM, because it makes the stabilising constants four times as large.

    Returns:
        float64 [B].

    Source: Wang et al., IEEE Transactions on Image Processing 13(4), 2004; the defaults of
    scikit-image's `structural_similarity`.
    """
    a, b = _planes("ssim", x, y)
    if min(a.shape[2:]) < WINDOW:
        raise ValueError(
            f"ssim: pictures must have at least {WINDOW} pixels a side, got "
            f"{a.shape[3]}x{a.shape[2]}"
        )
    mean_a, mean_b, aa, bb, ab = (
        F.avg_pool2d(map, WINDOW, stride=1) for map in (a, b, a * a, b * b, a * b)
    )
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    var_a, var_b, cov = (
        unbiased * (of - by) for of, by in ((aa, mean_a**2), (bb, mean_b**2), (ab, mean_a * mean_b))
    )
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(dim=(1, 2, 3))


def _planes(caller: str, *pictures: Tensor | np.ndarray) -> list[Tensor]:
    """Return 8-bit images as float64 [B, 3, H, W] in [0, 1]."""
    x, y = (torch.as_tensor(one) for one in pictures)
    if x.dtype != torch.uint8 or y.dtype != torch.uint8:
        raise TypeError(f"{caller}: pictures must be uint8, got {x.dtype} and {y.dtype}")
    if x.shape != y.shape or x.ndim != 4 or x.shape[-1] != 3:
        raise ValueError(
            f"{caller}: pictures must have one shape [B, H, W, 3], got {tuple(x.shape)} and "
            f"{tuple(y.shape)}"
        )
    return [one.permute(0, 3, 1, 2).double() / 255 for one in (x, y)]
