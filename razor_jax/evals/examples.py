"""Documents with the questions that share them, and how the questions are put."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

Form = Literal["chat", "user", "plain", "raw"]


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a document.

    Attributes:
      answers: the references that `metric`, a name in `metrics.METRICS`, scores by.
      prefix: the answer's first words, put into the model's mouth.
      meta: whatever a table is cut by (depth, length, task); JSON values.
    """

    text: str
    answers: tuple[str, ...]
    metric: str = "contains_all"
    prefix: str = ""
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Example:
    """A document and the questions that share it."""

    document: str
    questions: tuple[Question, ...]
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class QuestionFormat:
    """How the questions are put, the same for every setting.

    Attributes:
      question_inside_prefill: the second column: one prefill of document and question together.
      form: "chat": by the chat template, the document as system message where it knows one; "user": document and
        question are one user message, joined as they are; "plain": "Question: … Answer:" after the document; "raw": as
        they are, no template. None: chat where the model has a template, otherwise plain.
      batch: rows of a call.
      stop: strings that end an answer.
    """

    question_inside_prefill: bool = False
    form: Form | None = None
    batch: int = 8
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if self.form not in (None, *typing.get_args(Form)):
            raise ValueError(f"form={self.form!r}: use one of {', '.join(typing.get_args(Form))}, or None")
        for name in ("batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
