"""Needles: facts hidden in real text, asked for after the text was compressed.

    razor-jax eval needle --lengths 1024,2048 --depths 0,25,50,75,100 --documents 8

Variants, all in the words that razor-mini was trained on, which any other model understands as well:

    single       one fact a document, at an exact depth
    facts        many facts about different things in one document, each asked for
    multi-key    the same, the facts so alike that one word tells two of them apart
    multi-value  one name with several values in one document: all of them are asked for
    multi-query  several facts are asked for in one question
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from ..needles import facts
from ..params import Params
from .haystack import Haystack, counter, overhead, take
from .protocol import Example, Form, Question

Variant = Literal["single", "facts", "multi-key", "multi-value", "multi-query"]
VARIANTS: tuple[Variant, ...] = typing.get_args(Variant)
ANSWER_TOKENS = 32  # an answer is a sentence of about 15 tokens; the variants with several say several
_VALUES, _TOGETHER = 4, 3  # values of one name; facts in one question
_SPLIT = "held_out"  # of names: combinations that razor-mini was not trained on


@dataclasses.dataclass(frozen=True)
class Grid:
    """What documents are made.

    Attributes:
      lengths: tokens of everything that is read and generated.
      depths: 0 to 1; the place of the single needle, and the bins for facts of the other variants.
      documents: of each length, and for `single` of each depth.
      facts: in a document of the variants with many.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    documents: int = 8
    facts: int = 16
    seed: int = 1

    def __post_init__(self):
        if not self.lengths or min(self.lengths) < 1 or len(set(self.lengths)) < len(self.lengths):
            raise ValueError(f"lengths={self.lengths}: give different numbers of tokens, such as 1024,2048")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths}: give shares from 0 (start) to 1 (end)")
        if self.documents < 1 or self.facts < 1:
            raise ValueError(f"documents={self.documents}, facts={self.facts}: both must be at least 1")


def examples(
    params: Params, variant: Variant, grid: Grid, *, haystack: Haystack | None = None, form: Form | None = None
) -> list[Example]:
    """Return documents with their questions, the same for every setting of one tokenizer.

    Every question carries `length`, `depth` (the nearest of the grid's) and `variant`. Raises ValueError for an unknown
    variant, or a length that its facts do not fit in.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}: use one of {', '.join(VARIANTS)}")
    haystack = haystack or Haystack.load()
    made = []
    for length in grid.lengths:
        for index, depth in _cells(variant, grid):
            rng = np.random.default_rng([grid.seed, VARIANTS.index(variant), length, index])
            made.append(_example(params, variant, grid, length, depth, haystack, form, rng))
    return made


def answer_tokens(variant: Variant) -> int:
    """Return the room for the longest answer of a variant, in tokens."""
    return ANSWER_TOKENS * {"multi-value": _VALUES, "multi-query": _TOGETHER}.get(variant, 1)


def _cells(variant: Variant, grid: Grid) -> Iterator[tuple[int, float | None]]:
    """Yield a number for each document of a length, and its depth where it has one."""
    depths: Sequence[float | None] = grid.depths if variant == "single" else (None,)
    # The same text at each depth: only the needle moves.
    yield from ((index, depth) for index in range(grid.documents) for depth in depths)


def _example(
    params: Params,
    variant: Variant,
    grid: Grid,
    length: int,
    depth: float | None,
    haystack: Haystack,
    form: Form | None,
    rng: np.random.Generator,
) -> Example:
    planted, asked = _facts(variant, grid, rng)
    # Evenly spread, each at a random place of its stretch; in random order, so that depth gives nothing away.
    spread = (np.arange(len(planted)) + rng.random(len(planted))) / len(planted)
    depths = np.full(1, depth) if depth is not None else spread
    count = counter(params)
    stub = Example("x", tuple(Question(q.question, q.values) for q in asked))
    room = length - overhead(params, stub, form) - answer_tokens(variant)
    room -= sum(count("\n" + fact.sentence) for fact in planted)
    if room < 1:
        raise ValueError(f"{len(planted)} facts and a question do not fit in {length} tokens: use a longer length")
    document = plant(haystack.lines(rng), [fact.sentence for fact in planted], depths, count, room)
    at = {fact.question: depths[i] for i, fact in enumerate(planted)}
    metric = "contains_all" if len(asked[0].values) == 1 else "string_match_all"

    def question(each: facts.Question) -> Question:
        meta: dict[str, float] = {}
        if each.question in at:
            meta["depth"] = min(grid.depths, key=lambda d: abs(d - at[each.question]))
        return Question(each.question, each.values, metric, meta=meta)

    return Example(document, tuple(map(question, asked)), {"variant": variant, "length": length})


def _facts(variant: Variant, grid: Grid, rng: np.random.Generator) -> tuple[list[facts.Fact], list[facts.Question]]:
    """Return facts in the order in which they are planted, and the questions about them."""
    if variant == "single":
        planted = facts.make_facts(rng, 1, _SPLIT)
    elif variant == "multi-key":
        planted = facts.make_alike(rng, grid.facts, _SPLIT)
    elif variant == "multi-value":
        groups: list[list[facts.Fact]] = []
        for _ in range(-(-grid.facts // _VALUES)):
            groups.append(facts.make_repeated(rng, _VALUES, _SPLIT, [group[0] for group in groups]))
        planted = [fact for group in groups for fact in group]
        planted = [planted[i] for i in rng.permutation(len(planted))]
        return planted, [facts.multi_value([f for f in planted if f in group]) for group in groups]
    else:
        planted = facts.make_facts(rng, grid.facts, _SPLIT)
    if variant == "multi-query":
        order = [planted[i] for i in rng.permutation(len(planted))]
        groups = [order[i : i + _TOGETHER] for i in range(0, len(order), _TOGETHER)]
        return planted, [facts.multi_query(group) if len(group) > 1 else group[0].asked for group in groups]
    return planted, [fact.asked for fact in planted]


def plant(
    lines: Iterator[str], sentences: Sequence[str], depths: np.ndarray, count: Callable[[str], int], tokens: int
) -> str:
    """Make `tokens` tokens of lines with each sentence on its own line at its depth, 0 to 1."""
    taken, starts = take(lines, count, tokens)
    gaps = np.abs(starts[None, :] - np.asarray(depths)[:, None] * starts[-1]).argmin(1)
    merged: list[str] = []
    for gap in range(len(taken) + 1):
        merged += [sentence for sentence, at in zip(sentences, gaps, strict=True) if at == gap]
        merged += taken[gap : gap + 1]
    return "\n".join(merged)
