"""Split of a document and its questions, so that the document is cached once for all questions."""

from __future__ import annotations

import dataclasses
from typing import Any

from .assets import Assets

_QUESTION = "razor-jax-question"  # Placeholder for the question while the template is rendered.


@dataclasses.dataclass(frozen=True)
class DocumentAndQuestions:
    """A document for `prefill`, and the prompts to continue its cache with."""

    document: Any
    questions: tuple[Any, ...]


def split(assets: Assets | None, document: str, questions: list[str], chat: bool) -> DocumentAndQuestions:
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
    before, _, after = _conversation(assets, document).rpartition(_QUESTION)
    return DocumentAndQuestions(
        assets.encode(before, add_special=False),
        tuple(assets.encode(question.strip() + after, add_special=False) for question in questions),
    )


def _conversation(assets: Assets, document: str) -> str:
    """Return the rendered conversation with a placeholder for the question."""
    user = {"role": "user", "content": _QUESTION}
    one = [{"role": "user", "content": f"{document}\n\n{_QUESTION}"}]
    try:
        text = assets.apply_chat([{"role": "system", "content": document}, user])
    except ValueError:
        return assets.apply_chat(one)
    # Some templates ignore a system message silently.
    return text if document.strip() in text else assets.apply_chat(one)
