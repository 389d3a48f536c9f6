"""Split of a document and its questions, so that the document is cached once for all questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .assets import Assets

# Placeholders while the template is rendered.
_QUESTION = "razor-jax-question"
_DOCUMENT = "razor-jax-document"

Variables = Mapping[str, Any] | None  # Further names that a template reads.


@dataclasses.dataclass(frozen=True)
class DocumentAndQuestions:
    """A document for `prefill`, and the prompts to continue its cache with."""

    document: Any
    questions: tuple[Any, ...]


def split(
    assets: Assets | None, document: str, questions: list[str], chat: bool, variables: Variables = None
) -> DocumentAndQuestions:
    """Return the document and the prompt of each question, to be read one after the other.

    With `chat`, the document is the system message, or the start of the user message if the template supports no
    system message. Otherwise each question follows as plain text. Raises ValueError for empty texts, or if `chat`
    lacks a template.
    """
    if not document.strip():
        raise ValueError("the document is empty: give text to ask about")
    for question in questions:
        if not question.strip():
            raise ValueError("a question is empty: give each question some text")
    if not chat:
        return DocumentAndQuestions(
            document, tuple(f"\n\nQuestion: {question.strip()}\nAnswer:" for question in questions)
        )
    if assets is None:
        raise ValueError("these params have no tokenizer and no chat template: ask without chat")
    return DocumentAndQuestions(
        document_ids(assets, document, variables),
        tuple(question_ids(assets, question, variables) for question in questions),
    )


def document_ids(assets: Assets, document: str, variables: Variables = None) -> list[int]:
    """Return the tokens of a conversation up to the question, by the chat template."""
    return assets.encode(_around_question(assets, document, variables)[0], add_special=False)


def question_ids(assets: Assets, question: str, variables: Variables = None) -> list[int]:
    """Return the tokens of a question after `document_ids`, up to the answer."""
    return assets.encode(question.strip() + _around_question(assets, _DOCUMENT, variables)[1], add_special=False)


def _around_question(assets: Assets, document: str, variables: Variables) -> tuple[str, str]:
    """Return the rendered conversation before and after the question."""

    def render(*messages: dict[str, str]) -> str:
        return assets.apply_chat(messages, variables=variables)

    one = {"role": "user", "content": f"{document}\n\n{_QUESTION}"}
    try:
        text = render({"role": "system", "content": document}, {"role": "user", "content": _QUESTION})
    except ValueError:
        text = render(one)
    # Some templates ignore a system message silently.
    if document.strip() not in text:
        text = render(one)
    before, _, after = text.rpartition(_QUESTION)
    return before, after
