"""Training rows of razor-mini: planted facts with questions, repeated segments, plain text.

A batch is a pure function of (seed, step), so a resumed run sees what an unbroken one would have.
B rows, T tokens of a row, M = T/2 scored places of a row: the vocabulary is only evaluated where a
target counts.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from tokenizers import Tokenizer

from razor_jax.needles.facts import (
    Fact,
    Question,
    load_documents,
    make_alike,
    make_facts,
    make_repeated,
    multi_query,
    multi_value,
    sentences,
)

from . import vocabulary

DIGIT, PHRASE, COPY, TEXT = 1.0, 0.3, 0.8, 0.1  # weight of a target: value, rest of an answer, copy, prose
TOGETHER = 0.1  # chance that the next facts are asked for in one question


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of the curriculum. `copy` and `needle` are shares of the rows; the rest is plain text."""

    steps: int
    length: int  # T, tokens of a row
    rows: int  # B
    copy: float
    needle: float
    max_facts: int
    learning_rate: float
    final_rate: float | None = None  # learning rate at the stage's end; constant without
    layers: int | None = None  # depth of the model in this stage, all of it without
    jumps: int = 8  # most jumps of position in a row; 0 leaves a random offset
    copy_prose: float = 0.3  # share of copy rows that repeat prose, not random ids
    copy_gaps: float = 0.4  # share of copy rows with other text between the copies
    alike: float = 0.4  # share of needle rows whose facts one word tells apart
    repeated: float = 0.3  # share of needle rows where `groups` names have several values each
    groups: int = 1


@dataclasses.dataclass(frozen=True)
class Batch:
    tokens: np.ndarray  # int32 [B, T]
    positions: np.ndarray  # int32 [B, T], increasing, with gaps
    places: np.ndarray  # int32 [B, M], where a target is scored
    targets: np.ndarray  # int32 [B, M]
    weights: np.ndarray  # float32 [B, M]


class Rows:
    """Makes batches from the train split; holds the encoded text and the special ids."""

    def __init__(self, tokenizer: Tokenizer, max_positions: int):
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.vocabulary = tokenizer.get_vocab_size()
        self.ordinary = len(vocabulary.SPECIALS)  # ids from here on are ordinary
        self.special = {name: np.array([i], np.int32) for name, i in vocabulary.special_ids(tokenizer).items()}
        documents = load_documents("train")
        lines = [self.encode("\n" + s) for d in documents for p in d.paragraphs for s in sentences(p)]
        self.starts = np.cumsum([0, *map(len, lines)])
        self.text = np.concatenate(lines)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def batch(self, stage: Stage, seed: int, step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        rows = [self._row(rng, stage) for _ in range(stage.rows)]
        tokens = np.stack([r[0] for r in rows])
        weights = np.stack([r[1] for r in rows])
        positions = np.stack([spread(rng, stage.length, self.max_positions, stage.jumps) for _ in rows])
        return Batch(tokens, positions, *_scored(rng, tokens, weights))

    def _row(self, rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens [T] and, for each, its weight as a target [T]."""
        draw = rng.random()
        if draw < stage.copy:
            return self._copy_row(rng, stage)
        if draw < stage.copy + stage.needle:
            return self._needle_row(rng, stage)
        return self._text_row(rng, stage.length)

    def _prose(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Return `size` tokens of running text from the start of a random line."""
        start = self.starts[rng.integers(np.searchsorted(self.starts, len(self.text) - size))]
        return self.text[start : start + size]

    def _text_row(self, rng: np.random.Generator, T: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.concatenate([self.special[vocabulary.BOS], self._prose(rng, T - 1)])
        return tokens, np.full(T, 3 * TEXT, np.float32)

    def _copy_row(self, rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Return a segment (random ids, or prose) repeated to the end, sometimes with other text between the copies."""
        T = stage.length
        length = int(np.exp(rng.uniform(np.log(8), np.log(T // 2))))
        if rng.random() >= stage.copy_prose:
            segment = self.ordinary + rng.integers(self.vocabulary - self.ordinary, size=length).astype(np.int32)
        else:
            segment = self._prose(rng, length)
        gap = int(rng.integers(0, T // 2)) if rng.random() < stage.copy_gaps else 0
        parts, weights = [self.special[vocabulary.BOS], segment], [np.zeros(1 + length)]
        while sum(map(len, parts)) < T:
            parts += [self._prose(rng, gap), segment] if gap else [segment]
            # The first token of a copy cannot be foreseen after other text.
            scores = np.full(length, COPY)
            scores[0] = 0 if gap else COPY
            weights += [np.full(gap, TEXT), scores] if gap else [scores]
        return np.concatenate(parts)[:T], np.concatenate(weights)[:T].astype(np.float32)

    def _needle_row(self, rng: np.random.Generator, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Make a document, then questions and answers as chat turns, of exactly T tokens."""
        T = stage.length
        facts, asked = _questions(rng, stage)
        turns, weights = zip(*(self._turn(q) for q in asked), strict=True)
        planted = [self.encode("\n" + f.sentence) for f in facts]
        opening, closing = self._frame(rng)
        spare = T - len(opening) - len(closing) - sum(map(len, planted))
        keep = np.searchsorted(np.cumsum([*map(len, turns)]), spare)  # questions that fit
        keep = max(1, int(rng.integers(1, keep + 1))) if keep > 1 and rng.random() < 0.3 else max(1, int(keep))
        asking, asking_weights = np.concatenate(turns[:keep]), np.concatenate(weights[:keep])
        document = self._document(rng, planted, max(0, spare - len(asking)))
        tokens = np.concatenate([opening, document, closing, asking])[:T]
        score = np.concatenate([np.full(len(opening) + len(document) + len(closing), TEXT), asking_weights])[:T]
        return np.pad(tokens, (0, T - len(tokens))), np.pad(score, (0, T - len(score))).astype(np.float32)

    def _frame(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return what is before and after the document: mostly the chat form, otherwise the bare text after BOS."""
        bos = self.special[vocabulary.BOS]
        if rng.random() < 0.75:
            return np.concatenate([bos, self.special[vocabulary.SYSTEM]]), self.special[vocabulary.END]
        return bos, np.zeros(0, np.int32)

    def _document(self, rng: np.random.Generator, planted: list[np.ndarray], size: int) -> np.ndarray:
        """Return facts at random line starts of `size` tokens of prose."""
        first = rng.integers(np.searchsorted(self.starts, len(self.text) - size))
        start = self.starts[first]
        inside = self.starts[first : np.searchsorted(self.starts, start + size)]
        cuts = np.sort(rng.choice(np.append(inside, start + size), size=len(planted))) - start
        prose = np.split(self.text[start : start + size], cuts)
        mixed = [prose[0]]
        for fact, piece in zip(planted, prose[1:], strict=True):
            mixed += [fact, piece]
        return np.concatenate(mixed)[1:]  # a document does not begin with a line break

    def _turn(self, asked: Question) -> tuple[np.ndarray, np.ndarray]:
        """Return one question and its answer, with the answer's weights."""
        s = self.special
        question = [s[vocabulary.USER], self.encode(asked.question), s[vocabulary.END], s[vocabulary.ASSISTANT]]
        answer = self.encode(asked.answer)
        digits = np.array(vocabulary.is_digit(self.tokenizer, answer.tolist()))
        tokens = np.concatenate([*question, answer, s[vocabulary.END]])
        weights = np.concatenate([np.full(sum(map(len, question)), TEXT), np.where(digits, DIGIT, PHRASE), [PHRASE]])
        return tokens, weights


def _questions(rng: np.random.Generator, stage: Stage) -> tuple[list[Fact], list[Question]]:
    """Return up to `max_facts` facts and the repeated ones in the order in which they are planted, and what is
    asked.
    """
    count = int(rng.integers(1, stage.max_facts + 1))
    make = make_alike if rng.random() < stage.alike else make_facts
    facts = make(rng, count, "train")
    planted, groups = list(facts), []
    if rng.random() < stage.repeated:
        for _ in range(stage.groups):
            groups.append(make_repeated(rng, int(rng.integers(2, 5)), "train", planted))
            planted += groups[-1]
    asked: list[Question] = []
    single = [facts[i] for i in rng.permutation(len(facts))]
    while single:
        size = int(rng.integers(2, 4)) if rng.random() < TOGETHER else 1
        group, single = single[:size], single[size:]
        asked.append(multi_query(group) if len(group) > 1 else group[0].asked)
    planted = [planted[i] for i in rng.permutation(len(planted))]
    for group in groups:  # early, for late questions may not fit
        asked.insert(int(rng.integers(min(2, len(asked)) + 1)), multi_value([f for f in planted if f in group]))
    return planted, asked


def spread(rng: np.random.Generator, T: int, max_positions: int, most: int = 8) -> np.ndarray:
    """Return positions int32 [T]: plain for a third of the rows, else an offset and up to `most` random jumps.

    Short rows then show the rotary embedding every distance of a long context.
    """
    positions = np.arange(T)
    room = max_positions - T
    if room <= 0 or rng.random() < 1 / 3:
        return positions.astype(np.int32)
    if most == 0:
        return (positions + int(rng.integers(room + 1))).astype(np.int32)
    jumps = int(rng.integers(1, most + 1))
    total = int(rng.integers(0, room + 1))
    sizes = np.diff(np.sort(np.append(rng.integers(0, total + 1, size=jumps), [0, total])))
    places = np.append(rng.integers(1, T, size=jumps), 0)
    shift = np.zeros(T, np.int64)
    np.add.at(shift, places, sizes)
    return (positions + np.cumsum(shift)).astype(np.int32)


def _scored(rng: np.random.Generator, tokens: np.ndarray, weights: np.ndarray):
    """Return the M = T/2 next-token targets of each row that weigh most, ties at random."""
    B, T = tokens.shape
    ahead = weights[:, 1:]
    noisy = ahead + 1e-3 * rng.random(ahead.shape)
    places = np.sort(np.argpartition(-noisy, T // 2 - 1, axis=1)[:, : T // 2], axis=1)
    rows = np.arange(B)[:, None]
    return places.astype(np.int32), tokens[rows, places + 1], ahead[rows, places]
