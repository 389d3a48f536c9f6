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

import numpy as np
from tokenizers import Tokenizer

from .text import SPLITS, Document, load_documents
from .words import ADJECTIVES, KINDS, NOUNS

__all__ = ["Document", "Fact", "NeedleDocument", "chat", "load_documents", "needle_document", "plant"]

DIGITS = 5
_HELD_OUT_NAMES = 20  # per cent


@dataclasses.dataclass(frozen=True)
class Fact:
    """One planted sentence and its question. `depth` is where it begins, 0 (start) to 1 (end)."""

    sentence: str
    question: str
    answer: str  # the full sentence a trained model replies with
    value: str  # the digits that make an answer right
    depth: float


@dataclasses.dataclass(frozen=True)
class NeedleDocument:
    text: str
    facts: tuple[Fact, ...]
    tokens: int  # of `text`, without special tokens


@functools.cache
def names(split: str) -> tuple[tuple[str, str], ...]:
    """The (adjective, noun) combinations of one split."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; use one of {', '.join(SPLITS)}")

    def held_out(adjective: str, noun: str) -> bool:
        digest = hashlib.sha256(f"{adjective} {noun}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % 100 < _HELD_OUT_NAMES

    pairs = ((a, n) for a in ADJECTIVES for n in NOUNS)
    return tuple(p for p in pairs if held_out(*p) == (split == "held_out"))


def make_facts(rng: np.random.Generator, count: int, split: str) -> list[Fact]:
    """`count` facts with distinct names and distinct values; depths are set when they are planted."""
    pool = names(split)
    if not 0 <= count <= len(pool):
        raise ValueError(f"facts is {count}; use 0 to {len(pool)}, the names of the {split} split")
    chosen = rng.choice(len(pool), size=count, replace=False)
    values = rng.choice(10**DIGITS, size=count, replace=False)
    facts = []
    for index, number in zip(chosen, values, strict=True):
        kind, value = KINDS[rng.integers(len(KINDS))], f"{number:0{DIGITS}d}"
        name = " ".join(pool[index])
        sentence = f"The {kind} of the {name} is {value}."
        facts.append(Fact(sentence, f"What is the {kind} of the {name}?", sentence, value, 0.0))
    return facts


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def needle_document(
    rng: np.random.Generator,
    tokenizer: Tokenizer,
    tokens: int = 2048,
    facts: int = 4,
    split: str = "held_out",
) -> NeedleDocument:
    """A document of at most `tokens` tokens with `facts` facts at uniformly random depths.

    It falls short of `tokens` by less than the tokens of one word. Paragraphs run on from a random one of the
    split's documents, in reading order. Same generator state, same document.
    """
    planted = make_facts(rng, facts, split)
    # A line break before each line keeps token boundaries at line boundaries: lengths add up.
    spent = sum(count_tokens(tokenizer, "\n" + f.sentence) for f in planted)
    if spent > tokens:
        raise ValueError(f"tokens is {tokens}, but {facts} facts alone take {spent}; use more tokens or fewer facts")
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
    """Chat messages: the document as system message, then user and assistant turns in alternation."""
    roles = ("user", "assistant")
    spoken = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return [{"role": "system", "content": document}, *spoken]


def _prose(rng: np.random.Generator, tokenizer: Tokenizer, budget: int, split: str) -> list[str]:
    """Lines of the split's text that take at most `budget` tokens with a line break each; the last is cut."""
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
    """A paragraph in lines of whole sentences of about `limit` characters, so that depths are fine-grained."""
    lines = [""]
    for sentence in paragraph.replace(". ", ".\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(sentence) > limit:
            lines.append(sentence)
        else:
            lines[-1] = f"{lines[-1]} {sentence}".strip()
    return [line for line in lines if line]


def _cut(tokenizer: Tokenizer, line: str, budget: int) -> str:
    """The longest run of whole leading words that fits `budget` with its line break."""
    words = line.split(" ")
    low, high = 0, len(words)
    while low < high:
        middle = (low + high + 1) // 2
        fits = count_tokens(tokenizer, "\n" + " ".join(words[:middle])) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return " ".join(words[:low])


def corpus(seed: int = 0, facts: int = 4000) -> list[str]:
    """What the tokenizer is trained on: the train split's text, and planted sentences with their questions."""
    rng = np.random.default_rng(seed)
    planted = [f"{f.sentence}\n{f.question}" for f in make_facts(rng, facts, "train")]
    return [d.text for d in load_documents("train")] + planted
