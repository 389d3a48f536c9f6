"""A measured promise: held-out questions, answered dense and compressed at the chosen budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..config import HeadSplit, RazorConfig
from ..functional import cache_spec
from ..needles.tasks import make_tasks
from ..params import Params, with_heads
from .causal import Ablation, mask_of

_QUESTIONS = 8  # of a document


@dataclasses.dataclass(frozen=True)
class Promise:
    """What a split was measured to keep.

    Attributes:
      questions: asked; names, prose and phrasings are not those that heads were chosen by.
      dense, compressed: how many were answered right, every token of the value the likeliest.
      low, high: 95 % interval of compressed − dense, in points, over documents.
      saved: share of the bytes of a dense cache of the same type, 0 to 1.
      tokens: of a document.
      heads: KV heads that keep everything.
      policy: in words.
      families: name -> [questions, dense right, compressed right].
    """

    questions: int
    dense: int
    compressed: int
    low: float
    high: float
    saved: float
    tokens: int
    heads: int
    policy: str
    families: dict[str, list[int]]

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Promise:
        """Make a promise from its JSON. Raises ValueError for other fields or types."""
        try:
            found = cls(**data)
            numbers = (found.questions, found.dense, found.compressed, found.saved, found.tokens, found.heads)
            if all(isinstance(x, int | float) for x in numbers) and 0 <= found.dense <= found.questions:
                return found
        except TypeError:
            pass
        raise ValueError(f"promise={data!r}: must have the fields {', '.join(f.name for f in dataclasses.fields(cls))}")

    def __str__(self) -> str:
        change = 100 * (self.compressed - self.dense) / self.questions
        return (
            f"{self.heads} heads: {self.compressed} of {self.questions} held-out questions right, dense {self.dense} "
            f"({change:+.1f} points, {self.low:+.1f} … {self.high:+.1f}), {self.saved:.0%} of the bytes saved at "
            f"{self.tokens:,} tokens"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return dataclasses.asdict(self)


def measure(
    params: Params, split: HeadSplit, razor: RazorConfig, *, documents: int = 12, tokens: int = 2048, seed: int = 1
) -> Promise:
    """Ask held-out questions dense and under a split, each document compressed before its questions.

    Answers are teacher-forced through the same attention as generation. Raises ValueError for a policy that drops
    nothing from such documents, or streaming prefill.
    """
    tasks = make_tasks(params, "held_out", documents=documents, tokens=tokens, questions=_QUESTIONS, seed=seed)
    ablation = Ablation(params, tasks, razor)
    kept = mask_of(split)
    dense, compressed = (ablation(mask).right.reshape(_QUESTIONS, documents) for mask in (np.ones_like(kept), kept))
    per_document = compressed.mean(axis=0) - dense.mean(axis=0)
    half = 1.96 * per_document.std(ddof=1) / math.sqrt(documents)
    families: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        for turn, family in enumerate(task.families):
            counts = families.setdefault(family, [0, 0, 0])
            counts[0] += 1
            counts[1] += int(dense[turn, row])
            counts[2] += int(compressed[turn, row])
    longest = max(len(task.document) for task in tasks)
    dtype = razor.kv_dtype or str(params.dtype)
    small = cache_spec(with_heads(params, split), dataclasses.replace(razor, kv_dtype=dtype), longest).kv_bytes(1)
    none = HeadSplit.all(split.num_layers, split.num_kv_heads)
    whole = cache_spec(with_heads(params, none), dataclasses.replace(razor, kv_dtype=dtype), longest).kv_bytes(1)
    mean = float(per_document.mean())
    return Promise(
        questions=dense.size,
        dense=int(dense.sum()),
        compressed=int(compressed.sum()),
        low=round(100 * (mean - half), 2),
        high=round(100 * (mean + half), 2),
        saved=round(1 - small / whole, 4),
        tokens=tokens,
        heads=sum(split.counts),
        policy=razor.describe(),
        families=families,
    )
