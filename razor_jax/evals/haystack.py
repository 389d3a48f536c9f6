"""The text that facts are hidden in: razor-mini's held-out documents, or a folder of `.txt` files."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ..needles import facts
from ..needles.text import load_documents, load_folder
from ..params import Params
from .protocol import Example, Form, encode_example

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\b[a-z]{4,12}\b")


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Documents as paragraphs, and where they come from."""

    name: str
    documents: tuple[tuple[str, ...], ...]

    @classmethod
    def load(cls, folder: Path | None = None) -> Haystack:
        """Return the packaged held-out text, or every `.txt` file of a folder. Raises ValueError where there is
        none.
        """
        if folder is None:
            return cls("packaged held-out text", tuple(d.paragraphs for d in load_documents("held_out")))
        documents = load_folder(folder)
        return cls(f"{len(documents)} files of {folder.name}", tuple(document.paragraphs for document in documents))

    def paragraphs(self, rng: np.random.Generator) -> Iterator[str]:
        """Yield paragraphs without end, in reading order from a random paragraph of a random document."""
        order = [int(i) for i in rng.permutation(len(self.documents))]
        start = int(rng.integers(len(self.documents[order[0]])))
        yield from itertools.islice(self.documents[order[0]], start, None)
        for number in itertools.cycle((*order[1:], order[0])):
            yield from self.documents[number]

    def lines(self, rng: np.random.Generator) -> Iterator[str]:
        """Yield lines of whole sentences without end, about 240 characters each, as razor-mini's documents are
        written.
        """
        for paragraph in self.paragraphs(rng):
            yield from facts.sentences(paragraph)

    def sentences(self, rng: np.random.Generator) -> Iterator[str]:
        """Yield sentences without end."""
        for paragraph in self.paragraphs(rng):
            yield from (sentence for sentence in _SENTENCE_END.split(paragraph.strip()) if sentence)

    def words(self) -> list[str]:
        """Return its distinct lower-case words of 4 to 12 letters, in alphabetical order."""
        return sorted({word for d in self.documents for paragraph in d for word in _WORD.findall(paragraph)})


def fit(build: Callable[[int], str], count: Callable[[str], int], tokens: int, guess: int = 16) -> int:
    """Return the largest n, within one part in 64, for which `build(n)` has at most `tokens` tokens.

    Raises ValueError if not even one fits.
    """
    low, high = 0, max(1, guess)
    while count(build(high)) <= tokens:
        low, high = high, 2 * high
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        if count(build(middle)) <= tokens:
            low = middle
        else:
            high = middle
    if low == 0:
        raise ValueError(f"{tokens} tokens are too few: the task's own words take more")
    return low


def take(lines: Iterator[str], count: Callable[[str], int], tokens: int) -> tuple[list[str], np.ndarray]:
    """Take lines of at most `tokens` tokens, a line break each; the last is cut after a word to fill them.

    Returns them, and int [lines + 1] where each begins, and the end.
    """
    taken, starts = [], [0]
    for line in lines:
        words = line.split(" ")
        while words and starts[-1] + count("\n" + " ".join(words)) > tokens:
            words.pop()
        if words:
            taken.append(" ".join(words))
            starts.append(starts[-1] + count("\n" + taken[-1]))
        if len(words) < len(line.split(" ")):
            break
    return taken, np.asarray(starts)


def counter(params: Params) -> Callable[[str], int]:
    """Return the tokens of a text by the model's tokenizer, special ones left out."""
    assets = params.assets
    if assets is None or assets.tokenizer_json is None:
        raise ValueError("an evaluation on text needs a model with a tokenizer.json")
    return lambda text: len(assets.encode(text, add_special=False))


def overhead(params: Params, example: Example, form: Form | None) -> int:
    """Return the tokens that template and longest question of an example take beside its document."""
    document, questions = encode_example(params, dataclasses.replace(example, document="x"), form)
    return len(document) + max(map(len, questions))
