"""Split of a document and its questions, so that the document is cached once for all questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from .assets import Assets
from .chat_template import Message, check_messages, text_of

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


def prompt_ids(assets: Assets, prompt: str | Sequence[Message], variables: Variables = None) -> list[int]:
    """Return the tokens of a user's message or of a conversation, up to its answer, or to the end of one begun."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return assets.encode(_rendered(assets, messages, variables), add_special=False)


def document_ids(assets: Assets, document: str | Sequence[Message], variables: Variables = None) -> list[int]:
    """Return the tokens of a document, or of the messages so far, up to the user's question."""
    if isinstance(document, str):
        before, _ = _around_question(assets, document, variables)
    else:
        asked = [*document, {"role": "user", "content": _QUESTION}]
        before, _, _ = assets.apply_chat(asked, variables=variables).rpartition(_QUESTION)
    return assets.encode(before, add_special=False)


def question_ids(assets: Assets, question: str | Sequence[Message], variables: Variables = None) -> list[int]:
    """Return the tokens of a question after `document_ids`, up to the answer; of messages, the first is the question.

    Raises ValueError if that is not a user's.
    """
    before, after = _around_question(assets, _DOCUMENT, variables)
    if not isinstance(question, str):
        first, *rest = check_messages(question)
        if first["role"] != "user":
            raise ValueError(f"messages after a cached document begin with role {first['role']!r}: begin with a user's")
        text = _rendered(assets, [*_asked(assets, _DOCUMENT, text_of(first).strip(), variables), *rest], variables)
        return assets.encode(text.removeprefix(before), add_special=False)
    return assets.encode(question.strip() + after, add_special=False)


def _rendered(assets: Assets, messages: Sequence[Message], variables: Variables) -> str:
    begun = messages[-1].get("role") == "assistant"
    return (assets.continue_chat if begun else assets.apply_chat)(messages, variables=variables)


def _around_question(assets: Assets, document: str, variables: Variables) -> tuple[str, str]:
    """Return the rendered conversation before and after the question."""
    text = assets.apply_chat(_asked(assets, document, _QUESTION, variables), variables=variables)
    before, _, after = text.rpartition(_QUESTION)
    return before, after


def _asked(assets: Assets, document: str, question: str, variables: Variables) -> list[Message]:
    """Return the messages of a question about a document: a system message, if the template takes one, and a user's."""
    two: list[Message] = [{"role": "system", "content": document}, {"role": "user", "content": question}]
    one: list[Message] = [{"role": "user", "content": f"{document}\n\n{question}"}]
    try:
        # Some templates ignore a system message silently.
        return two if document.strip() in assets.apply_chat(two, variables=variables) else one
    except ValueError:
        return one
