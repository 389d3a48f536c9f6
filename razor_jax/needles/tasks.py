"""Families of retrieval tasks for choosing heads: many phrasings, documents compressed before the question.

Each family plants lines in prose and asks for them later. Names, prose and phrasings of calibration (`train`) and of
judgement (`held_out`) are disjoint. The first words of the answer are given, because a small model's free answers say
little about its memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ..params import Params
from ..tokenizer.assets import Assets
from .facts import names
from .text import load_documents

FAMILIES = ("facts", "pairs", "code")
_QUESTION = "razor-jax-question"  # Placeholder for the question while the template is rendered.

# kind -> values (None: five digits), and phrasings (sentence, question, first words of the answer). The last phrasing
# of a kind is held out of calibration.
_CITIES = [
    "Lisbon",
    "Oslo",
    "Kyoto",
    "Nairobi",
    "Quito",
    "Dublin",
    "Hanoi",
    "Vienna",
    "Tunis",
    "Perth",
    "Bogota",
    "Riga",
    "Accra",
    "Lima",
    "Doha",
    "Seoul",
]
_DISHES = [
    "lentil soup",
    "apple pie",
    "fried rice",
    "fish stew",
    "onion tart",
    "bean salad",
    "plum cake",
    "corn bread",
    "rice pudding",
]
_COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "silver", "brown", "white", "black", "pink", "grey"]
_JOBS = [
    "baker",
    "sailor",
    "teacher",
    "painter",
    "farmer",
    "lawyer",
    "pilot",
    "doctor",
    "singer",
    "miller",
    "tailor",
    "nurse",
]
_KINDS: dict[str, tuple[Sequence[str] | None, tuple[tuple[str, str, str], ...]]] = {
    "code": (None, (
        ("The access code of the {n} is {v}.", "What is the access code of the {n}?", "The access code of the {n} is"),
        ("Visitors of the {n} have to enter {v} at the gate.", "What do visitors of the {n} enter at the gate?",
         "Visitors of the {n} enter"),
        ("{v} is the number under which the {n} is registered.", "Under which number is the {n} registered?",
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
        ("For the {n} nothing is better than {v}.", "What is best for the {n}?", "For the {n} the best is"),
    )),
    "colour": (_COLOURS, (
        ("The flag of the {n} is {v}.", "Which colour is the flag of the {n}?", "The flag of the {n} is"),
        ("They painted the {n} {v} last year.", "Which colour did they paint the {n}?", "They painted the {n}"),
        ("The {n} has a {v} door.", "Which colour is the door of the {n}?", "The door of the {n} is"),
    )),
    "job": (_JOBS, (
        ("The owner of the {n} is a {v}.", "What is the profession of the owner of the {n}?",
         "The owner of the {n} is a"),
        ("A {v} takes care of the {n}.", "Who takes care of the {n}?", "The {n} is in the care of a"),
        ("The {n} was left to a {v}.", "To whom was the {n} left?", "The {n} was left to a"),
    )),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Task:
    """A document, and questions that were unknown while it was read, with their answers: token ids.

    Attributes:
      document: ids of everything before the question.
      turns: (question, answer) ids; the question ends with the first words of the answer.
      families: of each turn.
    """

    document: tuple[int, ...]
    turns: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    families: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Planted:
    line: str
    question: str
    prefix: str
    value: str
    family: str


def make_tasks(
    params: Params,
    split: str,
    *,
    documents: int,
    tokens: int,
    questions: int = 8,
    seed: int = 0,
    families: Sequence[str] = FAMILIES,
) -> list[Task]:
    """Make documents of about `tokens` tokens with `questions` questions each, families in turn.

    Args:
      split: "train" for calibration, "held_out" for judgement.

    Raises ValueError for an unknown family, or params without a tokenizer.
    """
    assets = params.assets
    if assets is None or assets.tokenizer_json is None:
        raise ValueError("retrieval tasks are text: they need a model with a tokenizer.json")
    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families:
        raise ValueError(f"families={list(families)}: choose from {', '.join(FAMILIES)}")
    return [
        _task(assets, split, tokens, questions, np.random.default_rng([seed, split == "held_out", i]), families)
        for i in range(documents)
    ]


def _task(
    assets: Assets, split: str, tokens: int, questions: int, rng: np.random.Generator, families: Sequence[str]
) -> Task:
    pool = names(split)
    chosen = [pool[i] for i in rng.choice(len(pool), questions, replace=False)]
    makers: dict[str, Callable[..., _Planted]] = {"facts": _fact, "pairs": _pair, "code": _constant}
    planted = [makers[families[i % len(families)]](rng, name, split) for i, name in enumerate(chosen)]
    lines = _prose(assets, rng, split, tokens - sum(len(_ids(assets, p.line)) + 1 for p in planted))
    # Evenly spread, each at a random place of its stretch.
    for index in reversed(range(questions)):
        low, high = (len(lines) * (index + at) // questions for at in (0, 1))
        lines.insert(int(rng.integers(low, high + 1)), planted[index].line)
    before, after = _frame(assets, "\n".join(lines))
    turns = [(_ids(assets, f"{p.question}{after}{p.prefix}"), _ids(assets, f" {p.value}")) for p in planted]
    return Task(_ids(assets, before), tuple(turns), tuple(p.family for p in planted))


def _fact(rng: np.random.Generator, name: tuple[str, str], split: str) -> _Planted:
    values, phrasings = _KINDS[str(rng.choice(list(_KINDS)))]
    ours = phrasings[-1:] if split == "held_out" else phrasings[:-1]
    sentence, question, prefix = ours[rng.integers(len(ours))]
    value = _digits(rng) if values is None else str(rng.choice(list(values)))
    words = {"n": " ".join(name), "v": value}
    return _Planted(sentence.format(**words), question.format(**words), prefix.format(**words), value, "facts")


def _pair(rng: np.random.Generator, name: tuple[str, str], split: str) -> _Planted:
    key, value = "-".join(name), _digits(rng)
    question = f"What is the value of {key}?" if split == "train" else f"Which number belongs to {key}?"
    return _Planted(f"{key}: {value}", question, f"{key}:", value, "pairs")


def _constant(rng: np.random.Generator, name: tuple[str, str], split: str) -> _Planted:
    key, value = "_".join(name).upper().replace(" ", "_"), _digits(rng)
    question = f"Which value does the constant {key} have?" if split == "train" else f"What is {key} set to?"
    return _Planted(f"{key} = {value}", question, f"{key} =", value, "code")


def _digits(rng: np.random.Generator) -> str:
    return f"{rng.integers(10_000, 100_000)}"


def _prose(assets: Assets, rng: np.random.Generator, split: str, budget: int) -> list[str]:
    """Take paragraphs in reading order from a random one, at most `budget` tokens with a line break each."""
    paragraphs = [p for document in load_documents(split) for p in document.paragraphs]
    start, lines, used = int(rng.integers(len(paragraphs))), [], 0
    for offset in range(len(paragraphs)):
        paragraph = paragraphs[(start + offset) % len(paragraphs)]
        used += len(_ids(assets, paragraph)) + 1
        if used > budget:
            break
        lines.append(paragraph)
    return lines


def _frame(assets: Assets, document: str) -> tuple[str, str]:
    """Return the text before and after the question: the document opens the user's turn, or plain text."""
    if assets.chat_template is None:
        return f"{document}\n\nQuestion: ", "\nAnswer: "
    text = assets.apply_chat([{"role": "user", "content": f"{document}\n\n{_QUESTION}"}])
    before, _, after = text.rpartition(_QUESTION)
    return before, after


def _ids(assets: Assets, text: str) -> tuple[int, ...]:
    return tuple(assets.encode(text, add_special=False))
