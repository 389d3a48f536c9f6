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
      answers: references for `metric`, a name in `metrics.METRICS`.
      prefix: first words of the answer, given to the model.
      meta: JSON values by which a table can be filtered (depth, length, task).
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
    """How questions are put to every setting.

    Attributes:
      question_inside_prefill: whether document and question go into one prefill (the second column).
      form: "chat": chat template, with the document as system message if the template allows one. "user": chat
        template, with document and question concatenated into one user message. "plain": "Question: … Answer:" after
        the document. "raw": document and question concatenated. None: "chat" if the model has a template, otherwise
        "plain".
      batch: rows per call.
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
