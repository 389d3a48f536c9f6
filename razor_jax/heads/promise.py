"""A measured promise: held-out questions, answered dense and compressed at the chosen budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import HeadSplit, RazorConfig
from ..functional import cache_spec
from ..needles.tasks import Task, make_tasks
from ..params import Params, with_heads
from .causal import Ablation, mask_of
from .mass import Progress

QUESTIONS = 8  # per document
_BATCH = 8  # documents that are read at once
FIT = 0.8  # dense attention must answer this share of a family, or the family says nothing about compression


@dataclasses.dataclass(frozen=True)
class Promise:
    """What a split was measured to keep.

    Attributes:
      questions: of the families that dense attention can do; names, prose and phrasings are not those that heads were
        chosen by.
      dense, compressed: how many of them were answered right, every token of the value the likeliest.
      low, high: 95 % interval of compressed − dense, in points, over documents; where nothing differed, 3 / questions.
      saved: share of the bytes of a dense cache of the same type, of bfloat16 beside int8 and fp8; 0 to 1.
      tokens: of a document.
      heads: KV heads that keep everything.
      policy: in words.
      families: name -> [questions, dense right, compressed right], those that dense attention cannot do included.
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
        text = (
            f"{self.heads} heads: {self.compressed} of {self.questions} held-out questions right, dense {self.dense} "
            f"({change:+.1f} points, {self.low:+.1f} … {self.high:+.1f}), {self.saved:.0%} of the bytes saved at "
            f"{self.tokens:,} tokens"
        )
        if self.unfit and len(self.unfit) < len(self.families):
            text += f"; not counted, because dense attention fails too: {', '.join(self.unfit)}"
        elif self.unfit:
            text += "; dense attention fails all kinds of these questions too: use shorter documents"
        return text

    @property
    def unfit(self) -> tuple[str, ...]:
        """Families that dense attention answers less than 80 % of; they do not count unless all are."""
        return tuple(name for name, (asked, dense, _) in self.families.items() if dense < FIT * asked)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, for JSON."""
        return dataclasses.asdict(self)


def measure(
    params: Params,
    split: HeadSplit | Sequence[HeadSplit],
    razor: RazorConfig,
    *,
    documents: int = 12,
    tokens: int = 2048,
    seed: int = 1,
    text: Path | None = None,
    progress: Progress | None = None,
) -> list[Promise]:
    """Ask held-out questions dense and under each split, each document compressed before its questions.

    Answers are teacher-forced through the same attention as generation; dense answers come from an unquantised cache.
    Families that dense attention answers less than 80 % of are reported but do not count, unless that holds for all of
    them.

    Args:
      split: one or several; one promise for each is returned.
      documents, tokens: documents of eight questions each.
      text: folder of .txt files to plant in, in place of the packaged text.
      progress: called with (documents done, documents).

    Memory: K/V of eight documents, dense and windowed. Raises ValueError for a policy that drops nothing from such
    documents, or streaming prefill.
    """
    splits = [split] if isinstance(split, HeadSplit) else list(split)
    tasks = make_tasks(
        params, "held_out", documents=documents, tokens=tokens, questions=QUESTIONS, seed=seed, text=text
    )
    dense, *found = answers(params, tasks, razor, [None, *map(mask_of, splits)], progress)
    families = np.asarray([task.families for task in tasks])
    longest = max(len(task.document) for task in tasks)
    made = zip(splits, found, strict=True)
    return [_promise(params, split, razor, dense, right, families, (tokens, longest)) for split, right in made]


def answers(
    params: Params,
    tasks: Sequence[Task],
    razor: RazorConfig,
    masks: Sequence[np.ndarray | None],
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Return which answers are right under each mask [L, K] of heads that keep everything, int [documents, questions].

    The mask None is dense attention over an unquantised cache.
    """
    found: list[list[np.ndarray]] = [[] for _ in masks]
    for first in range(0, len(tasks), _BATCH):
        batch = tasks[first : first + _BATCH]
        ablation = Ablation(params, batch, razor)
        for right, mask in zip(found, masks, strict=True):
            outcome = ablation.dense() if mask is None else ablation(mask)
            right.append(outcome.right.astype(int).reshape(-1, len(batch)).T)
        if progress is not None:
            progress(first + len(batch), len(tasks))
    return [np.concatenate(right) for right in found]


def fit_families(dense: np.ndarray, families: np.ndarray) -> np.ndarray:
    """Return which questions count, bool as `dense`: those of families that dense attention can do, or all."""
    names = np.unique(families)
    fit = [name for name in names if dense[families == name].mean() >= FIT]
    return np.isin(families, fit or names)


def _promise(
    params: Params,
    split: HeadSplit,
    razor: RazorConfig,
    dense: np.ndarray,
    found: np.ndarray,
    families: np.ndarray,
    lengths: tuple[int, int],
) -> Promise:
    counted = fit_families(dense, families)
    # The interval is over documents, because questions of one document are not independent.
    change = [(f - d)[c].mean() for f, d, c in zip(found, dense, counted, strict=True) if c.any()]
    half = 1.96 * float(np.std(change, ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else 1.0
    if (dense == found)[counted].all():
        half = 3 / int(counted.sum())  # the rule of three: n questions without a difference still allow one of 3 / n
    by_family = {}
    for name in dict.fromkeys(families.ravel().tolist()):
        of = families == name
        by_family[name] = [int(of.sum()), int(dense[of].sum()), int(found[of].sum())]
    tokens, longest = lengths
    return Promise(
        questions=int(counted.sum()),
        dense=int(dense[counted].sum()),
        compressed=int(found[counted].sum()),
        low=round(100 * (float(np.mean(change)) - half), 2),
        high=round(100 * (float(np.mean(change)) + half), 2),
        saved=round(saved(params, split, razor, longest), 4),
        tokens=tokens,
        heads=sum(split.counts),
        policy=razor.describe(),
        families=by_family,
    )


def saved(params: Params, split: HeadSplit, razor: RazorConfig, tokens: int) -> float:
    """Return the share of a dense cache's bytes that a split saves at `tokens`.

    The dense cache has the policy's type, or bfloat16 beside a quantised one.
    """
    policy = dataclasses.replace(razor, kv_dtype=razor.kv_dtype or str(params.dtype))
    spec = cache_spec(with_heads(params, split), policy, tokens)
    dtype = "bfloat16" if policy.kv_dtype in ("int8", "fp8") else policy.kv_dtype
    whole = dataclasses.replace(policy, kv_dtype=dtype, windowed_kv_dtype=None)
    every = with_heads(params, HeadSplit.all(split.num_layers, split.num_kv_heads))
    return 1 - spec.kv_bytes(1) / cache_spec(every, whole, tokens).kv_bytes(1)
