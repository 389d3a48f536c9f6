"""Documents with tasks of several families for choosing heads: every document is read before its questions.

Names, prose and phrasings of calibration (`train`) and of judgement (`held_out`) are disjoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..params import Params
from ..tokenizer.assets import Assets
from .facts import names
from .families import MAKERS
from .text import Document, load_documents, load_folder

FAMILIES = tuple(MAKERS)
_QUESTION = "razor-jax-question"  # Placeholder for the question while the template is rendered.


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


def make_tasks(
    params: Params,
    split: str,
    *,
    documents: int,
    tokens: int,
    questions: int = 8,
    seed: int = 0,
    families: Sequence[str] = FAMILIES,
    text: Path | None = None,
) -> list[Task]:
    """Make documents of about `tokens` tokens with `questions` questions each, families in turn.

    Args:
      split: "train" for calibration, "held_out" for judgement.
      text: folder of .txt files to plant in, a fifth of their paragraphs held out; None for the packaged text.

    Raises ValueError for an unknown family, params without a tokenizer, too few tokens, or a folder without text.
    """
    assets = params.assets
    if assets is None or assets.tokenizer_json is None:
        raise ValueError("retrieval tasks are text: they need a model with a tokenizer.json")
    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families:
        raise ValueError(f"families={list(families)}: choose from {', '.join(FAMILIES)}")
    prose = _paragraphs(load_documents(split) if text is None else load_folder(text, split))
    made = []
    for index in range(documents):
        rng = np.random.default_rng([seed, split == "held_out", index])
        chosen = [families[(index + turn) % len(families)] for turn in range(questions)]
        made.append(_task(assets, prose, split, tokens, chosen, rng))
    return made


def _task(
    assets: Assets, prose: list[str], split: str, tokens: int, families: Sequence[str], rng: np.random.Generator
) -> Task:
    pool = names(split)
    chosen = [" ".join(pool[i]) for i in rng.choice(len(pool), len(families), replace=False)]
    planted = [
        MAKERS[family](rng, name, number, split == "held_out")
        for number, (family, name) in enumerate(zip(families, chosen, strict=True))
    ]
    taken = sum(len(_ids(assets, line)) + 1 for each in planted for line in each.lines)
    lines = _prose(assets, rng, prose, tokens - taken)
    if not lines:
        raise ValueError(
            f"tokens={tokens}: a document holds {len(families)} questions and needs at least {taken + 256:,} tokens"
        )
    middle = [each.lines for each in planted if not each.first]
    # Evenly spread, each at a random place of its stretch; lines of one task stay in order, each at its own place.
    places = [
        (float(place), text)
        for index, several in enumerate(middle)
        for place, text in zip(np.sort(rng.uniform(index, index + 1, len(several))), several, strict=True)
    ]
    stretch = len(lines) / max(1, len(middle))
    for place, text in sorted(places, reverse=True):
        lines.insert(round(place * stretch), text)
    lines = [line for each in planted if each.first for line in each.lines] + lines
    before, after = _frame(assets, "\n".join(lines))
    turns = [(_ids(assets, f"{p.question}{after}{p.prefix}"), _ids(assets, f" {p.value}")) for p in planted]
    return Task(_ids(assets, before), tuple(turns), tuple(families))


def _paragraphs(documents: Sequence[Document]) -> list[str]:
    return [paragraph for document in documents for paragraph in document.paragraphs]


def _prose(assets: Assets, rng: np.random.Generator, paragraphs: list[str], budget: int) -> list[str]:
    """Take paragraphs in reading order from a random one that fits, at most `budget` tokens with a line break each."""
    start, lines, used = int(rng.integers(len(paragraphs))), [], 0
    for offset in range(len(paragraphs)):
        paragraph = paragraphs[(start + offset) % len(paragraphs)]
        size = len(_ids(assets, paragraph)) + 1
        if used + size > budget:
            if lines:
                break
            continue
        used += size
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
