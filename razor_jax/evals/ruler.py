"""RULER's synthetic tasks (arXiv 2404.06654) at any length, from text on hand.

    razor-jax eval ruler --model … --lengths 4096,8192 --tasks niah_single_1,vt --documents 100

Wording, task parameters and metric are those of the published benchmark (github.com/NVIDIA/RULER). What differs: the
essays are any text (RULER's are downloaded), keys are made of our own adjectives and nouns, the words to count come
from the text, and an example's seed is its own. So figures compare settings on one machine, not with a leaderboard.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import string
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..needles.words import ADJECTIVES, NOUNS
from ..params import Params
from .haystack import Haystack, counter, fit, overhead
from .protocol import Example, Form, Question
from .ruler_qa import Pool

# What every task is given: a draw, how much haystack to use, and the example's whole length in tokens.
Make = Callable[[np.random.Generator, int, int], "Parts"]

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_SHORT = 4096  # below, the word lists are thinner
_CHAIN = 5  # variables: one assignment and four hops
_COMMON = 10  # words to be found by `cwe`
_VALUES = 4


@dataclasses.dataclass(frozen=True)
class Parts:
    """A prompt cut where the question begins: `before` is compressed, `after` is asked, `prefix` begins the answer."""

    before: str
    after: str
    prefix: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: how it is made, how long its answers are, and RULER's metric for it."""

    make: Callable[[Haystack, Pool | None], Make]
    new_tokens: int
    metric: str = "string_match_all"
    needs: str | None = None  # the user's own file


def examples(
    params: Params,
    task: str,
    *,
    tokens: int,
    count: int,
    seed: int = 1,
    haystack: Haystack | None = None,
    questions: Path | None = None,
    form: Form | None = None,
) -> list[Example]:
    """Make `count` examples of a task with one question each; prompt and answer take `tokens` tokens.

    `questions` is SQuAD's or HotpotQA's JSON, for `qa_1` and `qa_2`. Raises ValueError for an unknown task, a missing
    file, or too few tokens.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}: use one of {', '.join(TASKS)}")
    about = TASKS[task]
    if about.needs is not None and questions is None:
        raise ValueError(f"{task} asks from {about.needs}, which is not packaged: give its JSON file")
    pool = Pool.read(questions) if about.needs is not None and questions is not None else None
    make, number = about.make(haystack or Haystack.load(), pool), list(TASKS).index(task)
    made, amount, size = [], 16, counter(params)
    for index in range(count):
        draw = functools.partial(np.random.default_rng, [seed, number, tokens, index])
        parts = make(draw(), 1, tokens)
        room = tokens - about.new_tokens - overhead(params, _example(parts, about, {}), form)
        try:
            amount = fit(lambda n, draw=draw: make(draw(), n, tokens).before, size, room, amount)
        except ValueError as error:
            raise ValueError(f"{task}: {error}") from error
        made.append(_example(make(draw(), amount, tokens), about, {"task": task, "length": tokens}))
    return made


def _example(parts: Parts, about: Task, meta: dict[str, Any]) -> Example:
    return Example(parts.before, (Question(parts.after, parts.answers, about.metric, parts.prefix),), meta)


# Needles


def _niah(
    hay: str, key: str, value: str, keys: int = 1, values: int = 1, queries: int = 1
) -> Callable[[Haystack, Pool | None], Make]:
    """Return a needle task: what the haystack is made of ("noise", "essay" or "needle"), and what keys and values
    are.
    """

    def of(haystack: Haystack, _: Pool | None) -> Make:
        return functools.partial(_needles, haystack, hay, key, value, max(keys, queries), values, queries)

    return of


def _needles(
    haystack: Haystack,
    hay: str,
    key: str,
    value: str,
    keys: int,
    values: int,
    queries: int,
    rng: np.random.Generator,
    amount: int,
    tokens: int,
) -> Parts:
    # Names in the haystack of needles are none of those asked for.
    names = _keys(rng, key, keys + (amount if hay == "needle" else 0))
    names, others = names[:keys], names[keys:]
    found = [[_value(rng, value) for _ in range(values)] for _ in names]

    def needle(name: str, answer: str) -> str:
        return f"One of the special magic {value} for {name} is: {answer}."

    needles = [needle(name, answer) for name, answers in zip(names, found, strict=True) for answer in answers]
    asked = [int(i) for i in rng.choice(keys, queries, replace=False)]
    order = [needles[i] for i in rng.permutation(len(needles))]
    if hay == "essay":
        context = " ".join(_insert(rng, _first(haystack.sentences(rng), amount), order))
    elif hay == "noise":
        context = "\n".join(_insert(rng, [_NOISE] * amount, order))
    else:
        context = "\n".join(_insert(rng, [needle(name, _value(rng, value)) for name in others], order))
    query = _listed([names[i] for i in asked])
    one = queries * values == 1
    what, are = (value.removesuffix("s"), "is") if one else (value, "are")
    opening = "A special magic" if one else "Some special magic"
    every = "is the" if one else "are all the"
    return Parts(
        f"{opening} {what} {'is' if one else 'are'} hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {what} afterwards.\n{context}\n",
        f"What {every} special magic {what} for {query} mentioned in the provided text?",
        f" The special magic {what} for {query} mentioned in the provided text {are}",
        tuple(answer for i in asked for answer in found[i]),
    )


def _keys(rng: np.random.Generator, kind: str, count: int) -> list[str]:
    """Draw different names: adjective-noun, with a second adjective where those run out, or uuids."""
    if kind == "uuids":
        return [_uuid(rng) for _ in range(count)]
    A, N = len(ADJECTIVES), len(NOUNS)
    numbers = rng.choice(A * N if count <= A * N // 2 else (A + 1) * A * N, count, replace=False)
    return [
        "-".join([*ADJECTIVES[i // (A * N) - 1 : i // (A * N)], ADJECTIVES[i // N % A], NOUNS[i % N]])
        for i in map(int, numbers)
    ]


def _value(rng: np.random.Generator, kind: str) -> str:
    return _uuid(rng) if kind == "uuids" else str(rng.integers(10**6, 10**7))


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def _first(items: Iterator[str], count: int) -> list[str]:
    return [next(items) for _ in range(count)]


def _insert(rng: np.random.Generator, lines: list[str], needles: Sequence[str]) -> list[str]:
    """Insert needles between lines at random places, in their order."""
    places = np.sort(rng.integers(0, len(lines) + 1, len(needles)))
    merged = list(lines)
    for place, text in zip(places[::-1], needles[::-1], strict=True):
        merged.insert(int(place), text)
    return merged


# Tracing and aggregation


def _tracking(haystack: Haystack, _: Pool | None) -> Make:
    """Make a variable-tracking prompt: a chain of assignments in noise, after a short example."""

    def chain(rng: np.random.Generator, amount: int, letters: int, value: str) -> Parts:
        names: list[str] = []
        while len(names) < _CHAIN:
            name = "".join(rng.choice(list(string.ascii_uppercase), letters))
            names += [name] if name not in names else []
        links = [f"VAR {names[0]} = {value}"]
        links += [f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(names)]
        context = "\n".join(_insert(rng, [_NOISE] * amount, links))
        return Parts(
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n" + context,
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{_CHAIN} variables are assigned the value {value}, they are: ",
            tuple(names),
        )

    def make(rng: np.random.Generator, amount: int, tokens: int) -> Parts:
        shown = chain(rng, 5, 3, str(rng.integers(10_000, 99_999)))
        asked = chain(rng, amount, 5, str(rng.integers(10_000, 99_999)))
        example = f"{shown.before}{shown.after}{shown.prefix} {' '.join(shown.answers)}\n"
        return dataclasses.replace(asked, before=f"{example}\n{asked.before}")

    return make


def _common_words(haystack: Haystack, _: Pool | None) -> Make:
    """Make a numbered list in which ten words are more frequent than the others, after a short example."""
    words = list(dict.fromkeys([*ADJECTIVES, *NOUNS, *haystack.words()]))
    more = [f"{a}-{n}" for a in ADJECTIVES for n in NOUNS]

    def listed(rng: np.random.Generator, distinct: int, common: int, other: int) -> Parts:
        known = words if distinct <= len(words) else words + more
        if distinct > len(known):
            raise ValueError(f"cwe needs {distinct} different words, there are {len(known)}: use a larger haystack")
        drawn = [str(word) for word in rng.choice(known, distinct, replace=False)]
        often, rest = drawn[:_COMMON], drawn[_COMMON:]
        repeated = often * common + rest * other
        context = " ".join(f"{i + 1}. {repeated[j]}" for i, j in enumerate(rng.permutation(len(repeated))))
        return Parts(
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{context}",
            "\nQuestion: What are the 10 most common words in the above list?",
            " Answer: The top 10 words that appear most often in the list are:",
            tuple(often),
        )

    def make(rng: np.random.Generator, amount: int, tokens: int) -> Parts:
        short = tokens < _SHORT
        shown = listed(rng, *((20, 3, 1) if short else (40, 10, 3)))
        asked = listed(rng, _COMMON + amount, *((6, 1) if short else (30, 3)))
        answers = " ".join(f"{i + 1}. {word}" for i, word in enumerate(shown.answers))
        return dataclasses.replace(asked, before=f"{shown.before}{shown.after}{shown.prefix} {answers}\n{asked.before}")

    return make


def _frequent_words(haystack: Haystack, _: Pool | None) -> Make:
    """Make coded words with zeta-distributed frequencies; the most frequent is noise, the next three are asked for."""
    alpha, letters = 2.0, 6
    zeta = np.pi**2 / 6  # of alpha

    def make(rng: np.random.Generator, amount: int, tokens: int) -> Parts:
        size = max(4, tokens // 50)
        drawn = rng.integers(0, 26, (2 * size, letters))
        coded = list(dict.fromkeys("".join(string.ascii_lowercase[i] for i in row) for row in drawn))[:size]
        coded[0] = "..."
        # RULER counts words: a unit of the search below is ten of them.
        counts = (10 * amount * np.arange(1, size + 1) ** -alpha / zeta).astype(int)
        words = np.repeat(np.asarray(coded), counts)
        return Parts(
            "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
            f"appeared coded words. {' '.join(words[rng.permutation(len(words))])}",
            "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most "
            "frequently appeared words in the above coded text?",
            " Answer: According to the coded text above, the three most frequently appeared words are:",
            tuple(coded[1:4]),
        )

    return make


def _answering(_: Haystack, pool: Pool | None) -> Make:
    """Return a question of SQuAD or HotpotQA, its paragraphs among others."""
    assert pool is not None

    def make(rng: np.random.Generator, amount: int, tokens: int) -> Parts:
        item = pool.items[rng.integers(len(pool.items))]
        chosen = pool.around(rng, item, amount)
        context = "\n\n".join(f"Document {i + 1}:\n{text}" for i, text in enumerate(chosen))
        only = "Only give me the answer and do not output any other words."
        return Parts(
            f"Answer the question based on the given documents. {only}\n\nThe following are given documents.\n\n"
            f"{context}",
            f"\n\nAnswer the question based on the given documents. {only}\n\nQuestion: {item.question}",
            " Answer:",
            item.answers,
        )

    return make


TASKS: dict[str, Task] = {
    "niah_single_1": Task(_niah("noise", "words", "numbers"), 128),
    "niah_single_2": Task(_niah("essay", "words", "numbers"), 128),
    "niah_single_3": Task(_niah("essay", "words", "uuids"), 128),
    "niah_multikey_1": Task(_niah("essay", "words", "numbers", keys=4), 128),
    "niah_multikey_2": Task(_niah("needle", "words", "numbers"), 128),
    "niah_multikey_3": Task(_niah("needle", "uuids", "uuids"), 128),
    "niah_multivalue": Task(_niah("essay", "words", "numbers", values=_VALUES), 128),
    "niah_multiquery": Task(_niah("essay", "words", "numbers", queries=4), 128),
    "vt": Task(_tracking, 30),
    "cwe": Task(_common_words, 120),
    "fwe": Task(_frequent_words, 50),
    "qa_1": Task(_answering, 32, "string_match_part", "SQuAD 2.0"),
    "qa_2": Task(_answering, 32, "string_match_part", "HotpotQA"),
}
