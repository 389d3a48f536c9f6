"""Questions of the seven families that heads are chosen by, in names, prose and phrasings held out of that choice.

The first words of an answer are given, because a small model's free answers say little about its memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..heads.promise import FIT
from ..needles.facts import names
from ..needles.families import MAKERS, Planted
from ..params import Params
from .haystack import Haystack, counter, overhead
from .needle import Grid, plant
from .protocol import Example, Form, Question
from .table import Table

ANSWER_TOKENS = 12  # the longest values are two words


def question_form(params: Params) -> Form:
    """Return how these questions are put: behind the document, in one user turn where the model has turns."""
    return "user" if params.assets and params.assets.chat_template is not None else "plain"


def examples(params: Params, grid: Grid, haystack: Haystack | None = None) -> list[Example]:
    """Return documents with `grid.facts` questions each, families in turn. Every question carries its `family`.

    Raises ValueError for a length that its facts do not fit in.
    """
    haystack, made = haystack or Haystack.load(), []
    for length in grid.lengths:
        for index in range(grid.documents):
            rng = np.random.default_rng([grid.seed, length, index])
            chosen = [list(MAKERS)[(index + turn) % len(MAKERS)] for turn in range(grid.facts)]
            made.append(_example(params, length, chosen, haystack, rng))
    return made


def _example(
    params: Params, length: int, chosen: Sequence[str], haystack: Haystack, rng: np.random.Generator
) -> Example:
    pool, count, form = names("held_out"), counter(params), question_form(params)
    called = [" ".join(pool[i]) for i in rng.choice(len(pool), len(chosen), replace=False)]
    planted = [MAKERS[family](rng, name, i, True) for i, (family, name) in enumerate(zip(chosen, called, strict=True))]
    questions = tuple(map(_question, planted, chosen))
    opening = "".join(f"{line}\n" for each in planted if each.first for line in each.lines)
    spread = [each.lines for each in planted if not each.first]
    sentences = [line for lines in spread for line in lines]
    # Evenly spread, each at a random place of its stretch; lines of one question stay in order.
    depths = [np.sort(i + rng.random(len(lines))) / len(spread) for i, lines in enumerate(spread)]
    room = length - overhead(params, Example("x", questions), form) - ANSWER_TOKENS
    room -= count(opening) + sum(count("\n" + line) for line in sentences)
    if room < 1:
        raise ValueError(f"{len(chosen)} questions do not fit in {length} tokens: use a longer length")
    text = plant(haystack.lines(rng), sentences, np.concatenate([np.zeros(0), *depths]), count, room)
    return Example(f"{opening}{text}\n\n" if form == "user" else opening + text, questions, {"length": length})


def _question(planted: Planted, family: str) -> Question:
    return Question(planted.question, (planted.value,), "starts_with", planted.prefix, {"family": family})


def fit(table: Table, kind: str) -> tuple[Table, tuple[str, ...]]:
    """Return the table of the questions that its first row can do, by the value of `kind` in their meta.

    The second value names the kinds that are left out. If the first row can do none, all count.
    """
    asked: dict[str, list[float]] = {question.meta[kind]: [] for _, question in table.questions}
    for (_, question), score in zip(table.questions, table.rows[0].scores, strict=True):
        asked[question.meta[kind]].append(score)
    unfit = tuple(name for name, scores in asked.items() if np.mean(scores) < FIT)
    if not unfit or len(unfit) == len(asked):
        return table, unfit
    return table.where(lambda _, question: question.meta[kind] not in unfit), unfit
