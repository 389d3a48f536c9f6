"""Needle tasks: facts planted in real text, and questions about them. NumPy and `tokenizers` only.

One format serves training, evaluation and the demo: a document of prose paragraphs, one a line, with
fact sentences as lines of their own at random depths; then, as chat turns, questions that were unknown
while the document was read. The answer repeats the fact; its five digits stand nowhere else.

One (adjective, noun) name in five is held out with the text: a combination that training never showed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from .text import SPLITS, Document, load_documents
from .words import ADJECTIVES, KINDS, NOUNS

__all__ = ["Document", "Fact", "NeedleDocument", "chat", "load_documents", "needle_document", "plant"]

DIGITS = 5
FAMILIES = ("needle", "alike", "multi_value", "multi_query")
_HELD_OUT_NAMES = 20  # per cent


@dataclasses.dataclass(frozen=True)
class Fact:
    """One planted sentence and its question. `depth` is where it begins, 0 (start) to 1 (end)."""

    sentence: str
    question: str
    answer: str  # the full sentence a trained model replies with
    value: str  # the digits that make an answer right
    depth: float

    @property
    def asked(self) -> Question:
        return Question(self.question, self.answer, (self.value,), self.depth)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with the sentence that answers it and the values that make the answer right, in order."""

    question: str
    answer: str
    values: tuple[str, ...]
    depth: float = 0.0  # where the first of its facts begins, 0 to 1


@dataclasses.dataclass(frozen=True)
class NeedleDocument:
    text: str
    facts: tuple[Fact, ...]
    tokens: int  # of `text`, without special tokens


@dataclasses.dataclass(frozen=True)
class FamilyDocument:
    text: str
    questions: tuple[Question, ...]
    tokens: int  # of `text`, without special tokens


@functools.cache
def names(split: str) -> tuple[tuple[str, str], ...]:
    """Return the (adjective, noun) combinations of one split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}")

    def held_out(adjective: str, noun: str) -> bool:
        digest = hashlib.sha256(f"{adjective} {noun}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % 100 < _HELD_OUT_NAMES

    pairs = ((a, n) for a in ADJECTIVES for n in NOUNS)
    return tuple(p for p in pairs if held_out(*p) == (split == "held_out"))


def make_facts(rng: np.random.Generator, count: int, split: str) -> list[Fact]:
    """Make `count` facts with distinct names and distinct values; planting sets their depths."""
    pool = names(split)
    if not 0 <= count <= len(pool):
        raise ValueError(f"facts is {count}; use 0 to {len(pool)}, the names of the {split} split")
    chosen = rng.choice(len(pool), size=count, replace=False)
    values = rng.choice(10**DIGITS, size=count, replace=False)
    return [_fact(KINDS[rng.integers(len(KINDS))], pool[i], int(n)) for i, n in zip(chosen, values, strict=True)]


def _fact(kind: str, name: tuple[str, str], number: int) -> Fact:
    value = f"{number:0{DIGITS}d}"
    subject = f"{kind} of the {' '.join(name)}"
    sentence = f"The {subject} is {value}."
    return Fact(sentence, f"What is the {subject}?", sentence, value, 0.0)


def make_alike(rng: np.random.Generator, count: int, split: str) -> list[Fact]:
    """Make `count` facts of few kinds, adjectives and nouns, so that one word tells two of them apart."""
    kinds, known = len(KINDS), frozenset(names(split))
    side = 2
    while True:  # a split lacks some combinations of the chosen words
        adjectives, nouns = (rng.choice(words, side, replace=False).tolist() for words in (ADJECTIVES, NOUNS))
        pool = sorted((a, n) for a in adjectives for n in nouns if (a, n) in known)
        if len(pool) * kinds >= count:
            break
        side = min(side + 1, len(ADJECTIVES))
    chosen = rng.choice(len(pool) * kinds, size=count, replace=False)
    values = rng.choice(10**DIGITS, size=count, replace=False)
    return [_fact(KINDS[i % kinds], pool[i // kinds], int(n)) for i, n in zip(chosen, values, strict=True)]


def make_repeated(rng: np.random.Generator, count: int, split: str, others: Sequence[Fact] = ()) -> list[Fact]:
    """Make `count` facts of one kind and name with distinct values; `others` are about other names."""
    pool = names(split)
    taken = {f.question for f in others}
    while True:
        kind, name = KINDS[rng.integers(len(KINDS))], pool[rng.integers(len(pool))]
        facts = [_fact(kind, name, int(n)) for n in rng.choice(10**DIGITS, size=count, replace=False)]
        if facts[0].question not in taken:
            return facts


def multi_value(facts: Sequence[Fact]) -> Question:
    """Return all values of one kind and name, in the order of `facts`, which should be the document's."""
    subject = facts[0].question.removeprefix("What is the ").removesuffix("?")
    return Question(
        f"What is every {subject}?", " ".join(f.sentence for f in facts), tuple(f.value for f in facts), facts[0].depth
    )


def multi_query(facts: Sequence[Fact]) -> Question:
    """Return several facts in one question, answered in the order asked."""
    subjects = [f.question.removeprefix("What is ").removesuffix("?") for f in facts]
    question = f"What is {' and '.join(subjects)}?"
    return Question(question, " ".join(f.sentence for f in facts), tuple(f.value for f in facts), facts[0].depth)


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def needle_document(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    tokens: int = 2048,
    facts: int = 4,
    split: str = "held_out",
) -> NeedleDocument:
    """Return a document of at most `tokens` tokens with `facts` facts at uniformly random depths.

    It falls short of `tokens` by less than the tokens of one word. Paragraphs run on from a random one of the
    split's documents, in reading order. Same generator state, same document.
    """
    return _planted(rng, tokenizer, tokens, make_facts(rng, facts, split), split)


def family_document(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    family: str,
    tokens: int = 2048,
    facts: int = 8,
    split: str = "held_out",
) -> FamilyDocument:
    """Return a document of at most `tokens` tokens of one trained family, with `facts` facts and its questions.

    needle: facts with names of their own, each asked for; one is the single needle, several are keys of like form.
    alike: the same with facts that one word tells apart. multi_value: a quarter of the facts (at least two) gives one
    name several values, all of them asked. multi_query: as needle, three facts a question.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; use one of {', '.join(FAMILIES)}")
    if family == "multi_value":
        values = max(2, facts // 4)
        others = make_facts(rng, max(0, facts - values), split)
        mixed = [*others, *make_repeated(rng, values, split, others)]
        document = _planted(rng, tokenizer, tokens, [mixed[i] for i in rng.permutation(len(mixed))], split)
        questions = [f.question for f in document.facts]
        asked = [multi_value([f for f in document.facts if questions.count(f.question) > 1])]
    else:
        make = make_alike if family == "alike" else make_facts
        document = _planted(rng, tokenizer, tokens, make(rng, facts, split), split)
        asked = [f.asked for f in document.facts]
        if family == "multi_query":
            shuffled = [document.facts[i] for i in rng.permutation(facts)]
            asked = [multi_query(shuffled[i : i + 3]) for i in range(0, facts - 2, 3)]
    return FamilyDocument(document.text, tuple(asked), document.tokens)


def _planted(
    rng: np.random.Generator, tokenizer: Tokenizer, tokens: int, planted: list[Fact], split: str
) -> NeedleDocument:
    """Return facts at random depths and in random order in prose that fills up to `tokens` tokens."""
    # A line break before each line keeps token boundaries at line boundaries: lengths add up.
    spent = sum(count_tokens(tokenizer, "\n" + f.sentence) for f in planted)
    if spent > tokens:
        many = f"{len(planted)} facts alone take {spent}"
        raise ValueError(f"tokens is {tokens}, but {many}; use more tokens or fewer facts")
    lines = _prose(rng, tokenizer, tokens - spent, split)
    return plant(rng, tokenizer, lines, planted)


def plant(rng: np.random.Generator, tokenizer: Tokenizer, lines: list[str], facts: list[Fact]) -> NeedleDocument:
    """Insert facts between lines at random depths, in random order."""
    gaps = np.sort(rng.integers(0, len(lines) + 1, size=len(facts)))
    merged: list[str] = []
    starts: list[int] = []
    remaining = list(zip(gaps, facts, strict=True))
    for index in range(len(lines) + 1):
        while remaining and remaining[0][0] == index:
            starts.append(sum(len(x) + 1 for x in merged))
            merged.append(remaining.pop(0)[1].sentence)
        if index < len(lines):
            merged.append(lines[index])
    text = "\n".join(merged)
    placed = (dataclasses.replace(f, depth=s / max(1, len(text))) for f, s in zip(facts, starts, strict=True))
    return NeedleDocument(text, tuple(placed), count_tokens(tokenizer, text))


def chat(document: str, *turns: str) -> list[dict[str, str]]:
    """Return chat messages: the document as system message, then user and assistant turns in alternation."""
    roles = ("user", "assistant")
    spoken = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return [{"role": "system", "content": document}, *spoken]


def _prose(rng: np.random.Generator, tokenizer: Tokenizer, budget: int, split: str) -> list[str]:
    """Take lines of the split's text, at most `budget` tokens with a line break each; the last is cut."""
    documents = load_documents(split)
    order = rng.permutation(len(documents))
    first = documents[order[0]].paragraphs
    skip = int(rng.integers(len(first)))
    paragraphs = list(first[skip:]) + [p for i in order[1:] for p in documents[i].paragraphs]
    lines: list[str] = []
    for paragraph in paragraphs * (1 + budget // 50_000):
        for line in sentences(paragraph):
            size = count_tokens(tokenizer, "\n" + line)
            if size > budget:
                cut = _cut(tokenizer, line, budget)
                return [*lines, cut] if cut else lines
            lines.append(line)
            budget -= size
    raise ValueError(f"the {split} text ran out {budget} tokens short; use a smaller token budget")


def sentences(paragraph: str, limit: int = 240) -> list[str]:
    """Return a paragraph in lines of whole sentences of about `limit` characters, so that depths are fine-grained."""
    lines = [""]
    for sentence in paragraph.replace(". ", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(sentence) > limit:
            lines.append(sentence)
        else:
            lines[-1] = f"{lines[-1]} {sentence}".strip()
    return [line for line in lines if line]


def _cut(tokenizer: Tokenizer, line: str, budget: int) -> str:
    """Return the longest run of whole leading words that fits `budget` with its line break."""
    words = line.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        fits = count_tokens(tokenizer, "\n" + " ".join(words[:middle])) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return " ".join(words[:low])


def corpus(seed: int = 0, facts: int = 4000) -> list[str]:
    """Return the text that the tokenizer is trained on: the train split, and planted sentences with their questions."""
    rng = np.random.default_rng(seed)
    planted = [f"{f.sentence}\n{f.question}" for f in make_facts(rng, facts, "train")]
    return [d.text for d in load_documents("train")] + planted
