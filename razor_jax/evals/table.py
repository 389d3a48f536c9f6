"""Scores of several settings on the same questions, with their caches: for people, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.table import Table as RichTable

from ..text.result import KVReport
from . import metrics
from .examples import Example, Question, QuestionFormat
from .stats import Difference, Share, paired_bootstrap, share_interval


def report_from(data: dict[str, Any]) -> KVReport:
    """Make a report from `KVReport.to_dict`."""
    fields = {field.name: data[field.name] for field in dataclasses.fields(KVReport)}
    return KVReport(**{**fields, "dropped_tokens": tuple(data["dropped_tokens"])})


def _figures(meta: dict[str, Any]) -> dict[str, Any]:
    """Drop texts, such as a reply of thousands of tokens, which every question would repeat."""
    return {name: value for name, value in meta.items() if not (isinstance(value, str) and len(value) > 200)}


@dataclasses.dataclass(frozen=True)
class Answered:
    """One document's answers.

    Attributes:
      answers: one a question.
      kv: the cache that they were read from: of the compressed document, before any question, in the headline column.
        Bytes are those of its whole batch.
      tokens: of the document.
      seconds: spent on it, compilation apart.
    """

    answers: tuple[str, ...]
    kv: KVReport
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "kv": self.kv.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Answered:
        return cls(tuple(data["answers"]), report_from(data["kv"]), data["tokens"], data["seconds"])


@dataclasses.dataclass(frozen=True)
class SettingScores:
    """One setting. Arrays run over the questions of all documents, in order.

    Attributes:
      scores: float64 [questions], 0 to 1.
      documents: int [questions], each one's document.
      answered: one a document.
    """

    name: str
    scores: np.ndarray
    documents: np.ndarray
    answered: tuple[Answered, ...]

    @classmethod
    def of(cls, name: str, examples: Sequence[Example], answered: Sequence[Answered]) -> SettingScores:
        """Score the answers."""
        scores, documents = [], []
        for number, (example, found) in enumerate(zip(examples, answered, strict=True)):
            for question, answer in zip(example.questions, found.answers, strict=True):
                scores.append(metrics.score(question.metric, answer, question.answers))
                documents.append(number)
        return cls(name, np.asarray(scores), np.asarray(documents), tuple(answered))

    @property
    def kv(self) -> KVReport:
        """The largest of its caches; `dropped_tokens` of every document."""
        largest = max((found.kv for found in self.answered), key=lambda kv: kv.capacity)
        return dataclasses.replace(largest, dropped_tokens=tuple(max(f.kv.dropped_tokens) for f in self.answered))

    @property
    def bytes(self) -> float:
        """Cache bytes a document, on average."""
        return float(np.mean([found.kv.allocated_bytes / found.kv.batch for found in self.answered]))

    @property
    def ratio(self) -> float:
        """Bytes of bfloat16 dense caches over bytes of these, all documents together."""
        dense = sum(found.kv.dense_bytes / found.kv.batch for found in self.answered)
        return dense / sum(found.kv.allocated_bytes / found.kv.batch for found in self.answered)

    @property
    def share_kept(self) -> float:
        """r, the share of KV heads that keep everything."""
        return self.answered[0].kv.share

    @property
    def dense(self) -> bool:
        return self.share_kept == 1

    @property
    def engaged(self) -> float:
        """Share of documents from which tokens were dropped."""
        return float(np.mean([found.kv.engaged for found in self.answered]))

    @property
    def seconds(self) -> float:
        return sum(found.seconds for found in self.answered)

    @property
    def score(self) -> Share:
        """Mean and interval."""
        return share_interval(self.scores, self.documents)


@dataclasses.dataclass(frozen=True)
class Table:
    """Settings × questions; the first setting is what the others are compared with."""

    examples: tuple[Example, ...]
    rows: tuple[SettingScores, ...]
    options: QuestionFormat

    def __getitem__(self, name: str) -> SettingScores:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no setting {name!r}: there are {', '.join(row.name for row in self.rows)}")

    @property
    def questions(self) -> list[tuple[Example, Question]]:
        """In the order of the scores."""
        return [(example, question) for example in self.examples for question in example.questions]

    def difference(self, name: str, reference: str | None = None, seed: int = 0) -> Difference:
        """Compare a setting with the first one, or another: the difference of scores with a paired 95 % interval."""
        a, b = self[reference] if reference is not None else self.rows[0], self[name]
        return paired_bootstrap(a.scores, b.scores, a.documents, seed)

    def where(self, keep: Callable[[Example, Question], bool]) -> Table:
        """Return the same table of some of the questions; documents without any are left out.

        Raises ValueError if none is left.
        """
        mask = np.asarray([keep(example, question) for example, question in self.questions])
        if not mask.any():
            raise ValueError("no question of the table was kept")
        documents = self.rows[0].documents
        left = sorted(set(documents[mask].tolist()))
        number = {old: new for new, old in enumerate(left)}
        examples, rows = [], []
        for old in left:
            kept = mask[documents == old]
            asked = tuple(q for q, k in zip(self.examples[old].questions, kept, strict=True) if k)
            examples.append(dataclasses.replace(self.examples[old], questions=asked))
        for row in self.rows:
            found = []
            for old in left:
                pairs = zip(row.answered[old].answers, mask[documents == old], strict=True)
                found.append(dataclasses.replace(row.answered[old], answers=tuple(a for a, k in pairs if k)))
            at = np.asarray([number[d] for d in documents[mask].tolist()])
            rows.append(SettingScores(row.name, row.scores[mask], at, tuple(found)))
        return Table(tuple(examples), tuple(rows), self.options)

    def render(self, title: str = "") -> RichTable:
        """Return the table for the terminal: score, difference to the first row in points, cache."""
        table = RichTable(title=title, box=box.SIMPLE, title_justify="left", caption=self.caption())
        # Names and intervals wrap: the table fits 80 columns. The rest is in the JSON.
        table.add_column("cache", min_width=9)
        table.add_column("right", justify="right", no_wrap=True)
        table.add_column("difference", justify="right", min_width=10)
        for name in ("lost/won", "KV bytes", "ratio", "engaged"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(row.name, *self._cells(row))
        return table

    def caption(self) -> str:
        """What the numbers are of."""
        asked, documents = len(self.rows[0].scores), len(self.examples)
        how = "inside the prefill" if self.options.question_inside_prefill else "after the document was compressed"
        return (
            f"{asked:,} questions on {documents:,} documents, put {how}; difference to {self.rows[0].name} in points, "
            "paired bootstrap over documents; bytes a document; ratio to a dense bfloat16 cache"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return every setting with every question's score, and each question's meta, for JSON."""
        documents = self.rows[0].documents.tolist()
        return {
            "options": dataclasses.asdict(self.options),
            "documents": len(self.examples),
            "questions": [
                {"document": document, **_figures(example.meta), **_figures(question.meta)}
                for document, (example, question) in zip(documents, self.questions, strict=True)
            ],
            "settings": [self._setting(row) for row in self.rows],
        }

    def _setting(self, row: SettingScores) -> dict[str, Any]:
        lost, won = self._changes(row)
        change, low, high = self.difference(row.name)
        return {
            "setting": row.name,
            **row.score._asdict(),
            "difference": change,
            "difference_low": low,
            "difference_high": high,
            "lost": lost,
            "won": won,
            "bytes": row.bytes,
            "ratio": row.ratio,
            "heads_kept": row.share_kept,
            "engaged": row.engaged,
            "seconds": row.seconds,
            "kv": row.kv.to_dict(),
            "scores": [round(score, 6) for score in row.scores.tolist()],
        }

    def _changes(self, row: SettingScores) -> tuple[int, int]:
        """Return questions on which a setting does worse, and better, than the first one."""
        change = row.scores - self.rows[0].scores
        return int((change < 0).sum()), int((change > 0).sum())

    def _cells(self, row: SettingScores) -> tuple[str, ...]:
        change, below, above = self.difference(row.name)
        lost, won = self._changes(row)
        first = row is self.rows[0]
        return (
            f"{row.score.share:.1%}",
            "" if first else f"{100 * change:+.2f} ({100 * below:+.2f} … {100 * above:+.2f})",
            "" if first else f"{lost}/{won}",
            f"{row.bytes:,.0f}",
            f"{row.ratio:.2f}×",
            "dense" if row.dense else {0.0: "NO", 1.0: "yes"}.get(row.engaged, f"{row.engaged:.0%}"),
        )
