"""Agreement of rankings and of splits."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ..config import HeadSplit
from .select import Head


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Return the rank correlation of two score arrays of one shape, -1 to 1.

    Ties share their mean rank. The result is NaN if one array is constant.
    """
    if a.shape != b.shape:
        raise ValueError(f"scores have shapes {a.shape} and {b.shape}: they must be of one shape")
    ranks = [_ranks(x.reshape(-1)) for x in (a, b)]
    ranks = [r - r.mean() for r in ranks]
    norm = np.sqrt(np.prod([np.sum(r * r) for r in ranks]))
    return float(np.sum(ranks[0] * ranks[1]) / norm) if norm > 0 else float("nan")


def heads(split: HeadSplit) -> frozenset[Head]:
    """Return the (layer, KV head) pairs of all retrieval heads."""
    return frozenset((layer, head) for layer, kept in enumerate(split.retrieval) for head in kept)


def overlap(a: HeadSplit, b: HeadSplit) -> float:
    """Return the number of shared heads divided by the size of the larger split; 1 for two empty splits."""
    larger = max(sum(a.counts), sum(b.counts))
    return len(heads(a) & heads(b)) / larger if larger else 1.0


def undecided(splits: Sequence[HeadSplit]) -> list[tuple[Head, int]]:
    """Return the heads that only some of the splits keep, each with the number of splits that keep it."""
    kept = list(itertools.chain.from_iterable(map(heads, splits)))
    counts = [(head, kept.count(head)) for head in sorted(set(kept))]
    return [(head, count) for head, count in counts if count < len(splits)]


def pairwise(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Return the Spearman correlation of every pair of scores, float64 [n (n - 1) / 2]."""
    return np.asarray([spearman(a, b) for a, b in itertools.combinations(scores, 2)])


def _ranks(x: np.ndarray) -> np.ndarray:
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]
