"""Confidence intervals for clustered scores: questions about one document are not independent draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959964  # two-sided 95 % quantile of the normal distribution


class Difference(NamedTuple):
    """Mean of b minus mean of a, with its interval, as shares of 1 and not in points."""

    difference: float
    low: float
    high: float


class Share(NamedTuple):
    """A mean score from 0 to 1, with its interval."""

    share: float
    low: float
    high: float


def paired_bootstrap(
    scores_a: Sequence[float] | np.ndarray,
    scores_b: Sequence[float] | np.ndarray,
    clusters: Sequence[int] | np.ndarray | None = None,
    seed: int = 0,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
) -> Difference:
    """Estimate how much higher b scores than a on the same questions, by percentile bootstrap over documents.

    Args:
      scores_a, scores_b: [questions], in the same order.
      clusters: [questions], the document of each. Documents are drawn with replacement, with all their questions.
        None: every question is its own cluster.

    If a and b agree on every question, the interval is [0, 0], however few the questions.
    Raises ValueError for empty input or arrays of different lengths.
    """
    a, b = (np.asarray(scores, np.float64) for scores in (scores_a, scores_b))
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise ValueError(f"scores have shapes {a.shape} and {b.shape}: give two lists of scores on the same questions")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence={confidence}, resamples={resamples}: use a share below 1 and at least 1 resample")
    sums, sizes = _totals(b - a, clusters)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    # In pieces, because thousands of documents times ten thousand resamples are gigabytes.
    piece = max(1, 2**22 // len(sums))
    for first in range(0, resamples, piece):
        drawn = rng.integers(0, len(sums), size=(min(piece, resamples - first), len(sums)))
        means[first : first + piece] = sums[drawn].sum(1) / sizes[drawn].sum(1)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return Difference(float((b - a).mean()), float(low), float(high))


def share_interval(scores: Sequence[float] | np.ndarray, clusters: Sequence[int] | np.ndarray | None = None) -> Share:
    """Return a mean score with Wilson's 95 % interval for the effective number of questions.

    The effective number is n · v / v_c, at most n: v is the variance of the mean if all n questions were independent,
    v_c its variance by clusters. Unlike a bootstrap interval, this one has a width at 0 and at 100 %, too.
    Raises ValueError for empty input or scores outside 0 to 1.
    """
    values = np.asarray(scores, np.float64)
    if values.ndim != 1 or not values.size or values.min() < 0 or values.max() > 1:
        raise ValueError("scores must be a non-empty list of numbers from 0 to 1")
    n, p = float(values.size), float(values.mean())
    apart, together = (_variance(_totals(values - p, ids)[0]) for ids in (None, clusters))
    n = n * min(1.0, apart / together) if together > 0 else n
    middle = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * np.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n)) / (1 + _Z**2 / n)
    return Share(p, max(0.0, float(middle - half)), min(1.0, float(middle + half)))


def _variance(sums: np.ndarray) -> float:
    """Return the variance of the total over independent clusters, given each one's sum of deviations from the mean."""
    return float((sums**2).sum()) * len(sums) / max(1, len(sums) - 1)


def _totals(values: np.ndarray, clusters: Sequence[int] | np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the count of each cluster's values, float64 [clusters]."""
    if clusters is None:
        return values, np.ones_like(values)
    ids = np.asarray(clusters)
    if ids.shape != values.shape:
        raise ValueError(f"{len(ids)} clusters but {len(values)} scores: give one cluster per score")
    _, index = np.unique(ids, return_inverse=True)
    return np.bincount(index, weights=values), np.bincount(index).astype(np.float64)
