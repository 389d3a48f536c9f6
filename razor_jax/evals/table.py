"""Scores of several settings on the same questions, with their caches, for the terminal and as JSON."""

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
    """Make a `KVReport` from its `to_dict`."""
    fields = {field.name: data[field.name] for field in dataclasses.fields(KVReport)}
    return KVReport(**{**fields, "dropped_tokens": tuple(data["dropped_tokens"])})


def _figures(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the meta without long texts, such as a reply, which every question would repeat."""
    return {name: value for name, value in meta.items() if not (isinstance(value, str) and len(value) > 200)}


@dataclasses.dataclass(frozen=True)
class Answered:
    """Answers to the questions about one document.

    Attributes:
      answers: one per question.
      kv: report on the cache that they were read from; in the headline column on the compressed document, before any
        question. Bytes are those of the whole batch.
      tokens: length of the document.
      seconds: time spent, compilation excluded.
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
    """Scores of one setting. Arrays cover the questions of all documents, in order.

    Attributes:
      scores: float64 [questions], 0 to 1.
      documents: int [questions], the index of each question's document.
      answered: one per document.
    """

    name: str
    scores: np.ndarray
    documents: np.ndarray
    answered: tuple[Answered, ...]

    @classmethod
    def of(cls, name: str, examples: Sequence[Example], answered: Sequence[Answered]) -> SettingScores:
        """Score the answers of a setting."""
        scores, documents = [], []
        for number, (example, found) in enumerate(zip(examples, answered, strict=True)):
            for question, answer in zip(example.questions, found.answers, strict=True):
                scores.append(metrics.score(question.metric, answer, question.answers))
                documents.append(number)
        return cls(name, np.asarray(scores), np.asarray(documents), tuple(answered))

    @property
    def kv(self) -> KVReport:
        """Report on the largest cache, with the `dropped_tokens` of every document."""
        largest = max((found.kv for found in self.answered), key=lambda kv: kv.capacity)
        return dataclasses.replace(largest, dropped_tokens=tuple(max(f.kv.dropped_tokens) for f in self.answered))

    @property
    def bytes(self) -> float:
        """Mean cache bytes per document."""
        return float(np.mean([found.kv.allocated_bytes / found.kv.batch for found in self.answered]))

    @property
    def ratio(self) -> float:
        """Bytes of dense bfloat16 caches divided by the bytes of these caches, over all documents."""
        dense = sum(found.kv.dense_bytes / found.kv.batch for found in self.answered)
        return dense / sum(found.kv.allocated_bytes / found.kv.batch for found in self.answered)

    @property
    def share_kept(self) -> float:
        """Share of KV heads that keep the whole cache."""
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
        """Mean score with its interval."""
        return share_interval(self.scores, self.documents)


@dataclasses.dataclass(frozen=True)
class Table:
    """Settings × questions; the other settings are compared with the first."""

    examples: tuple[Example, ...]
    rows: tuple[SettingScores, ...]
    options: QuestionFormat

    def __getitem__(self, name: str) -> SettingScores:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no setting {name!r}: use one of {', '.join(row.name for row in self.rows)}")

    @property
    def questions(self) -> list[tuple[Example, Question]]:
        """All (document, question) pairs, in the order of the scores."""
        return [(example, question) for example in self.examples for question in example.questions]

    def difference(self, name: str, reference: str | None = None, seed: int = 0) -> Difference:
        """Return a setting's scores minus those of `reference` (default: the first), with a paired 95 % interval."""
        a, b = self[reference] if reference is not None else self.rows[0], self[name]
        return paired_bootstrap(a.scores, b.scores, a.documents, seed)

    def where(self, keep: Callable[[Example, Question], bool]) -> Table:
        """Return the table of the questions that `keep` selects, without documents that lose all of theirs.

        Raises ValueError if no question is selected.
        """
        mask = np.asarray([keep(example, question) for example, question in self.questions])
        if not mask.any():
            raise ValueError("no question of the table is selected: select at least one")
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
        """Return the table for the terminal: score, difference to the first row in points, and cache."""
        table = RichTable(title=title, box=box.SIMPLE, title_justify="left", caption=self.caption())
        # Names and intervals wrap so that the table fits 80 columns. The JSON has the rest.
        table.add_column("cache", min_width=9)
        table.add_column("right", justify="right", no_wrap=True)
        table.add_column("difference", justify="right", min_width=10)
        for name in ("lost/won", "KV bytes", "ratio", "engaged"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(row.name, *self._cells(row))
        return table

    def caption(self) -> str:
        """Return what was asked, and the units of the columns."""
        asked, documents = len(self.rows[0].scores), len(self.examples)
        how = "inside the prefill" if self.options.question_inside_prefill else "after the document was compressed"
        return (
            f"{asked:,} questions on {documents:,} documents, asked {how}; difference to {self.rows[0].name} in "
            "points, paired bootstrap over documents; bytes per document; ratio to a dense bfloat16 cache"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all settings with the score of every question, and the questions' meta, for JSON."""
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
        """Return on how many questions a setting is worse than the first one, and on how many better."""
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
