"""Scores of every head, and the selection of retrieval heads from them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import HeadSplit, RazorConfig, check_int
from ..files import write_text
from ..notebook import table
from ..params import Params, architecture_fingerprint, weights_fingerprint
from . import select
from .select import Head

_FORMAT, _VERSION = "razor_jax.scores", 1


@dataclasses.dataclass(frozen=True)
class ProbeMeta:
    """Provenance of scores, complete enough to reproduce them.

    Attributes:
      preset: "paper", "vendor", or the name of another method.
      seeds: random seeds; scores are the mean over them.
      block: K_p, the number of ids in a block.
      repeats: number of copies of the block.
      architecture, weights: fingerprints of the model.
      head_dim: H of the model, 0 if unknown.
      dtype: dtype of the weights, and of the cache unless a policy sets another; "" if unknown.
      floor: noise of the scores; a head at or below it is not known to retrieve. 0 if unknown.
      note: free text, such as the reason for a block shorter than that of the paper.
    """

    preset: str
    seeds: tuple[int, ...] = ()
    block: int = 0
    repeats: int = 0
    architecture: str = ""
    weights: str = ""
    head_dim: int = 0
    dtype: str = ""
    floor: float = 0.0
    note: str = ""

    @classmethod
    def of(
        cls,
        params: Params,
        preset: str,
        *,
        seeds: Sequence[int] = (),
        block: int = 0,
        repeats: int = 0,
        floor: float = 0.0,
        note: str = "",
    ) -> ProbeMeta:
        """Return the provenance of scores of these params."""
        return cls(
            preset=preset,
            seeds=tuple(seeds),
            block=block,
            repeats=repeats,
            architecture=architecture_fingerprint(params.config),
            weights=weights_fingerprint(params),
            head_dim=params.config.head_dim,
            dtype=str(params.dtype),
            floor=floor,
            note=note,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class HeadScores:
    """Echo and induction scores of every head, in checkpoint order.

    Attributes:
      query_echo, query_induction: float64 [L, N], one score per query head, the mean over seeds.
      num_kv_heads: K; query head n belongs to KV head n // G.
      meta: provenance.
    """

    query_echo: np.ndarray
    query_induction: np.ndarray
    num_kv_heads: int
    meta: ProbeMeta

    def __post_init__(self):
        for name in ("query_echo", "query_induction"):
            scores = np.array(getattr(self, name), np.float64)
            scores.setflags(write=False)
            object.__setattr__(self, name, scores)
            if scores.ndim != 2 or not scores.size or scores.shape[1] % self.num_kv_heads:
                raise ValueError(
                    f"{name} has shape {scores.shape}: must be [layers, query heads], with query heads a "
                    f"multiple of num_kv_heads={self.num_kv_heads}"
                )
            if not np.isfinite(scores).all():
                layer, head = np.argwhere(~np.isfinite(scores))[0]
                raise ValueError(
                    f"{name} of layer {layer}, query head {head} is {scores[layer, head]}: the model's "
                    "forward pass overflows; load it with dtype='float32' or 'bfloat16' and probe again"
                )
        if self.query_echo.shape != self.query_induction.shape:
            shapes = self.query_echo.shape, self.query_induction.shape
            raise ValueError(f"query_echo {shapes[0]} and query_induction {shapes[1]} must be of one shape")

    def _repr_html_(self) -> str:
        rows = [(layer, *(f"{score:.2f}" for score in scores)) for layer, scores in enumerate(self.best)]
        return table(rows, ("layer", *range(self.num_kv_heads)))

    @property
    def group_size(self) -> int:
        """G, query heads per KV head."""
        return self.query_echo.shape[1] // self.num_kv_heads

    @property
    def echo(self) -> np.ndarray:
        """Echo score of each KV head, float64 [L, K]: the largest of its query heads."""
        return self._group_max(self.query_echo)

    @property
    def induction(self) -> np.ndarray:
        """Induction score of each KV head, float64 [L, K]: the largest of its query heads."""
        return self._group_max(self.query_induction)

    @property
    def best(self) -> np.ndarray:
        """The larger of echo and induction score of each KV head, float64 [L, K]."""
        return np.maximum(self.echo, self.induction)

    def above_floor(self, split: HeadSplit) -> int:
        """Return how many retrieval heads of a split have an echo or induction score above the noise floor."""
        signal = self.best > self.meta.floor
        return sum(int(signal[layer, head]) for layer, heads in enumerate(split.retrieval) for head in heads)

    def select(
        self,
        induction: float | None = None,
        echo: float | None = None,
        *,
        share: float | None = None,
        bytes: int | None = None,
        capacity: int | None = None,
        razor: RazorConfig | None = None,
        batch: int = 1,
        head_dim: int | None = None,
        always_layers: Sequence[int] = (),
        balanced_over: int = 1,
    ) -> HeadSplit:
        """Return the retrieval heads for one of three budgets.

        `select(share=)`: the round(share · L · K) KV heads with the largest score, induction or echo.
        `select(induction=, echo=)`: the top round(induction · L · K) by induction score, plus the top
        round(echo · L · K) by echo score (the paper). One alone leaves the other at 0.14 or 0.01 for G = 1, at 0.28 or
        0.02 (vendors' tools) for G > 1.
        `select()`: the paper's 0.14 and 0.01 for G = 1, share 0.3 for G > 1.
        `select(bytes=, capacity=)`: the largest number of heads, chosen as for `share`, whose cache of `batch` rows
        of `capacity` tokens takes at most `bytes` under the policy `razor` (None: that of the paper).

        A positive share keeps at least one head. Halves round to even, as in the published tool. Of tied heads the
        lower layer, then the lower head, wins; the note of the split counts the tied heads left out.

        Args:
          head_dim: H, for scores without it (`meta.head_dim` is 0).
          always_layers: layers that keep every head. They are added to induction= and echo=, and are part of share=
            and bytes=.
          balanced_over: number of devices. Round the count of each layer up to a multiple of it, so that all devices
            store the same number of retrieval heads. The added heads are part of bytes=, and are added to the others.

        Raises:
          ValueError: more than one budget, a budget too small for `always_layers`, or a value out of range.
        """
        if (share is not None) + (bytes is not None) + (induction is not None or echo is not None) > 1:
            raise ValueError("give one budget, not both: induction= and echo=, or share=, or bytes= and capacity=")
        if bytes is None and (capacity is not None or razor is not None):
            raise ValueError("capacity= and razor= apply to bytes= only: give bytes= as well, or leave them out")
        if share is bytes is induction is echo is None and self.group_size > 1:
            share = select.GROUPED_SHARE
        forced = select.whole_layers(always_layers, self.echo.shape)
        finish = functools.partial(self._split, whole=sorted(set(always_layers)), balanced_over=balanced_over)
        if share is not None:
            chosen, how = self._by_share(share, forced), f"share {share}"
        elif bytes is not None:
            memory = self.memory(capacity, razor, batch=batch, head_dim=head_dim)
            chosen, how = self._by_bytes(bytes, memory, forced, finish)
        else:
            return finish(*self._by_class(induction, echo, forced))
        tied = select.ties("score", self.best, chosen - forced)
        return finish(chosen, f"{how}, {tied}" if tied else how)

    def _by_class(self, induction: float | None, echo: float | None, forced: set[Head]) -> tuple[set[Head], str]:
        default = select.PAPER_SHARES if self.group_size == 1 else select.GROUPED_SHARES
        asked = (("induction", induction, default[0]), ("echo", echo, default[1]))
        heads, notes = set(forced), []
        for name, given, usual in asked:
            scores, share = getattr(self, name), select.fraction(name, usual if given is None else given)
            top = set(select.ranked(scores)[: select.head_count(share, scores.size)])
            heads |= top
            notes += [f"{name} {share}", select.ties(name, scores, top)]
        return heads, ", ".join(note for note in notes if note)

    def _by_share(self, share: float, forced: set[Head]) -> set[Head]:
        wanted = select.head_count(select.fraction("share", share), self.echo.size)
        if wanted < len(forced):
            raise ValueError(
                f"share={share} keeps {wanted} heads, but always_layers have {len(forced)}: "
                f"use a share of at least {len(forced) / self.echo.size:.3f}, or fewer always_layers"
            )
        return select.by_count(self.best, wanted, forced)

    def _by_bytes(
        self, limit: int, memory: select.Memory, forced: set[Head], finish: Callable[[set[Head], str], HeadSplit]
    ) -> tuple[set[Head], str]:
        limit = check_int("bytes", limit, 1)

        def heads(count: int) -> set[Head]:
            return select.by_count(self.best, count, forced)

        def size(count: int) -> int:
            return memory.bytes(finish(heads(count), ""))

        count = select.most_within(self.echo.size, lambda count: size(count) <= limit)
        if count is None:
            raise ValueError(
                f"bytes={limit:,}: a cache with {len(heads(0))} retrieval heads takes {size(0):,} "
                f"({memory.describe()}): raise bytes, lower capacity, or compress harder, "
                "razor=RazorConfig.compact(window=…)"
            )
        return heads(count), f"bytes {size(count):,} of {limit:,} ({memory.describe()})"

    def _split(self, heads: set[Head], how: str, *, whole: Sequence[int], balanced_over: int) -> HeadSplit:
        kept = select.balanced(heads, self.best, balanced_over)
        if whole:
            how += f", layers {list(whole)} whole"
        if len(kept) > len(heads):
            how += f", {len(kept) - len(heads)} added to balance {balanced_over} devices"
        names = {"architecture": self.meta.architecture, "weights": self.meta.weights}
        L, K = self.echo.shape
        return HeadSplit.of(L, K, kept, **names, note=f"{how} of {self.describe()}")

    def memory(
        self, capacity: int | None, razor: RazorConfig | None = None, *, batch: int = 1, head_dim: int | None = None
    ) -> select.Memory:
        """Return the cache parameters that a split's bytes depend on; the policy None is that of the paper."""
        if capacity is None:
            raise ValueError("bytes= needs capacity=, the number of tokens per row: prompt and answer")
        head_dim = head_dim or self.meta.head_dim
        if not head_dim:
            raise ValueError("these scores lack the head dimension: pass head_dim= (params.config.head_dim)")
        return select.Memory(
            check_int("capacity", capacity, 1),
            razor or RazorConfig(),
            check_int("head_dim", head_dim, 1),
            self.meta.dtype or "bfloat16",
            check_int("batch", batch, 1),
        )

    def curve(
        self,
        capacity: int,
        razor: RazorConfig | None = None,
        *,
        batch: int = 1,
        head_dim: int | None = None,
    ) -> tuple[select.CurvePoint, ...]:
        """Return cache bytes for each number of retrieval heads, from none to all, chosen as for `select(share=)`."""
        memory = self.memory(capacity, razor, batch=batch, head_dim=head_dim)
        (L, K), points = self.echo.shape, []
        for count in range(L * K + 1):
            spec = memory.spec(HeadSplit.of(L, K, select.by_count(self.best, count)))
            size = spec.kv_bytes(batch)
            points.append(select.CurvePoint(count, count / (L * K), size, spec.dense_bytes(batch) / size))
        return tuple(points)

    def describe(self) -> str:
        """Return preset, block, seeds and note in one line."""
        meta = self.meta
        line = f"preset {meta.preset}"
        if meta.block:
            line += f", {meta.block} ids × {meta.repeats}"
        if meta.seeds:
            line += f", seeds {list(meta.seeds)}"
        return line + (f" ({meta.note})" if meta.note else "")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores as versioned JSON."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadScores:
        """Read scores that `save` wrote."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))

    def to_json(self) -> dict[str, Any]:
        """Return plain lists and numbers. JSON preserves them exactly."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "num_kv_heads": self.num_kv_heads,
            "query_echo": self.query_echo.tolist(),
            "query_induction": self.query_induction.tolist(),
            "meta": dataclasses.asdict(self.meta),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeadScores:
        """Return scores from the result of `to_json`. Raise ValueError for other data."""
        found = (data.get("format"), data.get("version"))
        if found != (_FORMAT, _VERSION):
            raise ValueError(f"format and version are {found}, expected {(_FORMAT, _VERSION)}: not head scores")
        missing = [f for f in ("num_kv_heads", "query_echo", "query_induction", "meta") if f not in data]
        if missing:
            raise ValueError(f"head scores lack {', '.join(missing)}")
        meta = dict(data["meta"])
        unknown = sorted(meta.keys() - {field.name for field in dataclasses.fields(ProbeMeta)})
        if unknown or "preset" not in meta:
            raise ValueError(f"meta of head scores: {f'unknown {unknown[0]}' if unknown else 'no preset'}")
        meta["seeds"] = tuple(meta.get("seeds", ()))
        return cls(
            np.asarray(data["query_echo"]),
            np.asarray(data["query_induction"]),
            data["num_kv_heads"],
            ProbeMeta(**meta),
        )

    def _group_max(self, scores: np.ndarray) -> np.ndarray:
        return scores.reshape(scores.shape[0], self.num_kv_heads, -1).max(axis=-1)
