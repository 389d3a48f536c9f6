"""Seven families of retrieval tasks, each in several phrasings: lines to plant in prose, and a question about them.

A value is found only in the planted lines. Phrasings of calibration (`train`) and of judgement (`held_out`) are
disjoint. The first words of the answer are given, because a small model's free answers say little about its memory.
"""

# ruff: noqa: SIM905 (a word list reads better as words)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .words import NOUNS

_CITIES = "Lisbon Oslo Kyoto Nairobi Quito Dublin Hanoi Vienna Tunis Perth Bogota Riga Accra Lima Doha Seoul".split()
_DISHES = "lentil soup,apple pie,fried rice,fish stew,onion tart,bean salad,plum cake,corn bread,rice pudding".split(
    ","
)
_COLOURS = "red green blue yellow purple orange silver brown white black pink grey".split()
_JOBS = "baker sailor teacher painter farmer lawyer pilot doctor singer miller tailor nurse".split()
_LABELS = "gold iron silk salt wool clay".split()
_CATEGORIES = (  # the words of a category; their first half serves as examples in calibration, the second in judgement
    "sparrow falcon heron robin crow eagle pigeon swan".split(),
    "carrot onion potato cabbage pepper lettuce turnip celery".split(),
    "hammer chisel pliers wrench drill shovel screwdriver axe".split(),
)

# kind of fact -> values (None: five digits), and phrasings (sentence, question, first words of the answer). The last
# phrasing of a kind is held out of calibration.
_FACTS: dict[str, tuple[Sequence[str] | None, tuple[tuple[str, str, str], ...]]] = {
    "code": (None, (
        ("The access code of the {n} is {v}.", "What is the access code of the {n}?", "The access code of the {n} is"),
        ("Visitors of the {n} have to enter {v} at the gate.", "What do visitors of the {n} enter at the gate?",
         "Visitors of the {n} enter"),
        ("The {n} is registered under the number {v}.", "Under which number is the {n} registered?",
         "The {n} is registered under the number"),
    )),
    "city": (_CITIES, (
        ("The {n} was built in {v}.", "Where was the {n} built?", "The {n} was built in"),
        ("Nobody in {v} has forgotten the {n}.", "Where is the {n} not forgotten?", "The {n} is not forgotten in"),
        ("The {n} has moved to {v}.", "Where has the {n} moved?", "The {n} has moved to"),
    )),
    "dish": (_DISHES, (
        ("At the {n} they serve {v} on Sundays.", "What do they serve at the {n} on Sundays?", "On Sundays they serve"),
        ("The cook of the {n} is famous for {v}.", "What is the cook of the {n} famous for?",
         "The cook of the {n} is famous for"),
        ("Guests of the {n} always ask for {v}.", "What do guests of the {n} ask for?", "Guests of the {n} ask for"),
    )),
    "colour": (_COLOURS, (
        ("The flag of the {n} is {v}.", "Which colour is the flag of the {n}?", "The flag of the {n} is"),
        ("They painted the {n} {v} last year.", "Which colour did they paint the {n}?", "They painted the {n}"),
        ("The colour of the door of the {n} is {v}.", "Which colour is the door of the {n}?",
         "The colour of the door of the {n} is"),
    )),
    "job": (_JOBS, (
        ("The owner of the {n} is a {v}.", "What is the profession of the owner of the {n}?",
         "The owner of the {n} is a"),
        ("A {v} takes care of the {n}.", "Who takes care of the {n}?", "The {n} is in the care of a"),
        ("The {n} was left to a {v}.", "To whom was the {n} left?", "The {n} was left to a"),
    )),
}  # fmt: skip


class Planted(NamedTuple):
    """Lines to plant in a document, and a question about them.

    Attributes:
      lines: in order; each is a paragraph of its own.
      question, prefix: the question and the first words of its answer.
      value: what must follow.
      first: whether the lines open the document.
    """

    lines: tuple[str, ...]
    question: str
    prefix: str
    value: str
    first: bool = False


def _facts(rng: np.random.Generator, name: str, number: int, held_out: bool) -> Planted:
    values, phrasings = _FACTS[str(rng.choice(list(_FACTS)))]
    ours = phrasings[-1:] if held_out else phrasings[:-1]
    sentence, question, prefix = ours[rng.integers(len(ours))]
    words = {"n": name, "v": _digits(rng) if values is None else _one(rng, values)}
    return Planted((sentence.format(**words),), question.format(**words), prefix.format(**words), words["v"])


def _pairs(rng: np.random.Generator, name: str, number: int, held_out: bool) -> Planted:
    key, value = name.replace(" ", "-"), _digits(rng)
    question = f"Which number belongs to {key}?" if held_out else f"What is the value of {key}?"
    return Planted((f"{key}: {value}",), question, f"{key}:", value)


def _code(rng: np.random.Generator, name: str, number: int, held_out: bool) -> Planted:
    key, value = name.upper().replace(" ", "_"), _digits(rng)
    question = f"What is {key} set to?" if held_out else f"Which value does the constant {key} have?"
    return Planted((f"{key} = {value}",), question, f"{key} =", value)


def _copying(rng: np.random.Generator, name: str, number: int, held_out: bool) -> Planted:
    value = " ".join(rng.choice(NOUNS, 2, replace=False))
    if held_out:
        return Planted(
            (f"Motto of the {name}: {value}",), f"Repeat the motto of the {name}.", f"Motto of the {name}:", value
        )
    return Planted(
        (f"Slogan of the {name}: {value}",), f"What is the slogan of the {name}?", f"Slogan of the {name}:", value
    )


def _hops(rng: np.random.Generator, name: str, number: int, held_out: bool) -> Planted:
    room = f"{100 * (number % 9 + 1) + int(rng.integers(100))}"
    if held_out:
        value = _one(rng, _COLOURS)
        lines = (f"The {name} is in room {room}.", f"The walls of room {room} are {value}.")
        question = f"Which colour have the walls of the room of the {name}?"
        return Planted(lines, question, "The walls of that room are", value)
    value = _one(rng, _JOBS)
    lines = (f"The {name} belongs to house {room}.", f"In house {room} lives a {value}.")
    question = f"Who lives in the house that the {name} belongs to?"
    return Planted(lines, question, "In that house lives a", value)


def _instructions(rng: np.random.Generator, name: str, number: int, held_out: bool) -> Planted:
    value = _digits(rng)
    if held_out:
        line = f"Rule for all answers: whoever asks about the {name} is told the number {value}."
        return Planted(
            (line,), f"I ask about the {name}.", f"Whoever asks about the {name} is told the number", value, True
        )
    line = f"Instruction: when somebody mentions the {name}, always reply with {value}."
    return Planted(
        (line,), f"Somebody mentions the {name}.", f"When somebody mentions the {name}, I reply with", value, True
    )


def _labels(rng: np.random.Generator, name: str, number: int, held_out: bool) -> Planted:
    labels = [str(x) for x in rng.permutation(_LABELS)[: len(_CATEGORIES)]]
    asked, lines, question, value = int(rng.integers(len(_CATEGORIES))), [], "", ""
    tag, sign = name.replace(" ", "-"), "=>" if held_out else "->"
    for index, (words, label) in enumerate(zip(_CATEGORIES, labels, strict=True)):
        half = len(words) // 2
        ours = [str(x) for x in rng.permutation(words[half:] if held_out else words[:half])]
        lines += [f"{tag}: {word} {sign} {label}" for word in ours[:3]]
        if index == asked:
            question, value = ours[3], label
    order = rng.permutation(len(lines))
    ask = f"Label {question} as the examples of {tag} do."
    return Planted(tuple(lines[i] for i in order), ask, f"{tag}: {question} {sign}", value)


MAKERS: dict[str, Callable[[np.random.Generator, str, int, bool], Planted]] = {
    "facts": _facts,
    "pairs": _pairs,
    "code": _code,
    "copying": _copying,
    "hops": _hops,
    "instructions": _instructions,
    "labels": _labels,
}


def _digits(rng: np.random.Generator) -> str:
    return f"{rng.integers(10_000, 100_000)}"


def _one(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]
