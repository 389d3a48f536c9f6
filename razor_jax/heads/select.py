"""Selection of KV heads by rank and budget: pure functions of scores [L, K]."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .. import cache as kv
from ..config import HeadSplit, RazorConfig, check_int

PAPER_SHARES = (0.14, 0.01)  # by induction and by echo, for one query head per KV head
GROUPED_SHARES = (0.28, 0.02)  # of vendors' tools, for grouped query heads
GROUPED_SHARE = 0.3  # the default for grouped query heads, by the larger of the two scores

Head = tuple[int, int]  # (layer, KV head)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Parameters, besides the split, that the bytes of a cache depend on.

    Attributes:
      capacity: tokens per row.
      razor: cache policy of the windowed heads.
      head_dim: H.
      dtype: cache dtype if the policy sets none.
      batch: number of rows.
    """

    capacity: int
    razor: RazorConfig
    head_dim: int
    dtype: str = "bfloat16"
    batch: int = 1

    def spec(self, split: HeadSplit) -> kv.CacheSpec:
        """Return the spec of the cache for a split."""
        return kv.make_spec(split, self.head_dim, self.capacity, self.razor, self.dtype)

    def bytes(self, split: HeadSplit) -> int:
        """Return the bytes that `init_cache` allocates for the split."""
        return self.spec(split).kv_bytes(self.batch)

    def describe(self) -> str:
        """Return the parameters in one line."""
        rows = f"batch {self.batch} × " if self.batch > 1 else ""
        return f"{rows}{self.capacity:,} tokens, {self.razor.kv_dtype or self.dtype}, {self.razor.describe()}"


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """Cache size for one number of retrieval heads.

    Attributes:
      heads: number of retrieval heads.
      share: that number over all KV heads.
      bytes: size of the cache.
      ratio: size of a dense bfloat16 cache over `bytes`.
    """

    heads: int
    share: float
    bytes: int
    ratio: float


def by_count(scores: np.ndarray, wanted: int, forced: Iterable[Head] = ()) -> set[Head]:
    """Return `wanted` heads: the `forced` heads first, then those with the best scores [L, K]."""
    heads = set(forced)
    for head in ranked(scores):
        if len(heads) >= wanted:
            break
        heads.add(head)
    return heads


def whole_layers(layers: Sequence[int], shape: tuple[int, ...]) -> set[Head]:
    """Return every KV head of these layers."""
    found = {check_int("always_layers", layer, 0, shape[0] - 1) for layer in layers}
    return set(itertools.product(found, range(shape[1])))


def balanced(heads: set[Head], induction: np.ndarray, devices: int) -> set[Head]:
    """Return the heads, with the count of each layer rounded up to a multiple of `devices`.

    The best remaining heads by induction score are added, so all devices store the same number of full caches. Raises
    ValueError if `devices` does not divide the KV heads of a layer.
    """
    K = induction.shape[1]
    devices = check_int("balanced_over", devices, 1)
    if K % devices:
        allowed = [n for n in range(1, K + 1) if K % n == 0]
        raise ValueError(
            f"balanced_over={devices}: must divide the {K} KV heads of a layer: use one of {allowed}, or shard the "
            "cache by slot"
        )
    counts = {layer: sum(1 for at, _ in heads if at == layer) for layer in range(len(induction))}
    kept = set(heads)
    for layer, head in ranked(induction):
        if (layer, head) not in kept and counts[layer] % devices:
            kept.add((layer, head))
            counts[layer] += 1
    return kept


def most_within(total: int, fits: Callable[[int], bool]) -> int | None:
    """Return the largest n in 0..total with fits(n), or None. `fits` must be monotonic: False for all n above that."""
    n = bisect.bisect_left(range(total + 1), True, key=lambda n: not fits(n)) - 1
    return n if n >= 0 else None


def ties(name: str, scores: np.ndarray, chosen: set[Head]) -> str:
    """Return a note that counts the heads left out with the score of a chosen head; "" if there are none."""
    left = {head: scores[head] for head in np.ndindex(*scores.shape) if head not in chosen}
    best = max(left.values(), default=None)
    if all(scores[head] != best for head in chosen):
        return ""
    return f"{sum(score == best for score in left.values())} left out tie with the last by {name}"


def head_count(share: float, total: int) -> int:
    """Return round(share · total), with halves to even and a minimum of 1 for a positive share."""
    return max(1, round(share * total)) if share > 0 else 0


def ranked(scores: np.ndarray) -> list[Head]:
    """Return all (layer, head) of scores [L, K], best first. Ties are ordered by layer, then head."""
    order = np.argsort(-scores.reshape(-1), kind="stable")
    return [(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in order]


def fraction(name: str, value: Any) -> float:
    """Return `value` if it is a number from 0 to 1; raise ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: must be a share of the KV heads, from 0 to 1")
    return value
