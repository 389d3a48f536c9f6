"""What a probe found, and which heads to keep by it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import HeadSplit

# (induction, echo) shares: the paper's for one query head a KV head, what vendors ship for grouped ones.
PAPER_SHARES = (0.14, 0.01)
GROUPED_SHARES = (0.28, 0.02)

_FORMAT, _VERSION = "razor_jax.scores", 1


@dataclasses.dataclass(frozen=True)
class ProbeMeta:
    """How scores were made: enough to make them again.

    Attributes:
      preset: "paper", "vendor", or the name of another scorer.
      seeds: seeds of the random blocks; scores are their mean.
      block: K_p, ids in one block.
      repeats: times the block was repeated.
      architecture, weights: fingerprints of the model that was probed.
      note: what people should know, e.g. why the block is shorter than the paper's.
    """

    preset: str
    seeds: tuple[int, ...] = ()
    block: int = 0
    repeats: int = 0
    architecture: str = ""
    weights: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class HeadScores:
    """Echo and induction scores of every head, in the checkpoint's own order.

    Attributes:
      query_echo, query_induction: float64 [L, N] per query head, the mean over seeds.
      num_kv_heads: K; query head n belongs to KV head n // G.
      meta: how they were made.
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
                    f"{name} has shape {scores.shape}: must be [layers, query heads], the latter a multiple "
                    f"of num_kv_heads={self.num_kv_heads}"
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

    @property
    def group_size(self) -> int:
        """G, query heads per KV head."""
        return self.query_echo.shape[1] // self.num_kv_heads

    @property
    def echo(self) -> np.ndarray:
        """float64 [L, K]: of each KV head's query heads, the largest."""
        return self._group_max(self.query_echo)

    @property
    def induction(self) -> np.ndarray:
        """float64 [L, K]: of each KV head's query heads, the largest."""
        return self._group_max(self.query_induction)

    def select(
        self, induction: float | None = None, echo: float | None = None, *, share: float | None = None
    ) -> HeadSplit:
        """The KV heads to keep: the best by induction, and the best by echo.

        `select(induction=, echo=)`: the top round(induction · L · K) KV heads by induction score, united
        with the top round(echo · L · K) by echo score. What is not given is 0.14 / 0.01 for G = 1 (the
        paper's) and 0.28 / 0.02 for G > 1.
        `select(share=)`: exactly round(share · L · K) heads, about one in fifteen of them chosen by echo
        (the paper's proportion) and the others by induction.

        A positive share keeps at least one head. Halves round to even, as in the published tool; ties go
        to the lower layer, then the lower head.
        """
        if share is not None:
            if induction is not None or echo is not None:
                raise ValueError("give share=, or induction= and echo=, not both")
            heads, how = self._by_share(_fraction("share", share)), f"share {share}"
        else:
            default = PAPER_SHARES if self.group_size == 1 else GROUPED_SHARES
            induction = _fraction("induction", default[0] if induction is None else induction)
            echo = _fraction("echo", default[1] if echo is None else echo)
            total = self.echo.size
            heads = set(ranked(self.induction)[: head_count(induction, total)])
            heads |= set(ranked(self.echo)[: head_count(echo, total)])
            how = f"induction {induction}, echo {echo}"
        return HeadSplit.of(
            self.echo.shape[0],
            self.num_kv_heads,
            heads,
            architecture=self.meta.architecture,
            weights=self.meta.weights,
            note=f"{how} of {self.describe()}",
        )

    def describe(self) -> str:
        """One line: preset, block and seeds."""
        meta = self.meta
        line = f"preset {meta.preset}"
        if meta.block:
            line += f", {meta.block} ids × {meta.repeats}, seeds {list(meta.seeds)}"
        return line + (f" ({meta.note})" if meta.note else "")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the scores as versioned JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadScores:
        """Read what `save` wrote."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers; exact, for JSON carries float64."""
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
        """The inverse of `to_json`; raises ValueError if `data` is something else."""
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

    def _by_share(self, share: float) -> set[tuple[int, int]]:
        """As many heads as the share says: echo heads first, then down the induction ranking."""
        total = self.echo.size
        wanted = head_count(share, total)
        paper_echo = PAPER_SHARES[1] / sum(PAPER_SHARES)
        # A single head is an induction head: without any, copying fails altogether.
        num_echo = min(head_count(share * paper_echo, total), max(wanted - 1, 0))
        heads = set(ranked(self.echo)[:num_echo])
        for head in ranked(self.induction):
            if len(heads) >= wanted:
                break
            heads.add(head)
        return heads


def head_count(share: float, total: int) -> int:
    """round(share · total), halves to even; at least one head for a positive share."""
    return max(1, round(share * total)) if share > 0 else 0


def ranked(scores: np.ndarray) -> list[tuple[int, int]]:
    """(layer, head) of scores [L, K], best first; ties by layer, then head."""
    order = np.argsort(-scores.reshape(-1), kind="stable")
    return [(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in order]


def _fraction(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r}: must be a share of the KV heads, from 0 to 1")
    return value
