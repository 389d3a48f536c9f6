"""One document, many questions: where the text is cut, so that the document is read before any question."""

from __future__ import annotations

import dataclasses
from typing import Any

from .assets import Assets

_QUESTION = "razor-jax-question"  # Placeholder for the question while the template is rendered.


@dataclasses.dataclass(frozen=True)
class Split:
    """A document to `prefill` and the prompts that follow it in the cache."""

    document: Any
    questions: tuple[Any, ...]


def split(assets: Assets | None, document: str, questions: list[str], chat: bool) -> Split:
    """Cut a conversation about `document` before the question.

    By the chat template the document is the system message, or opens the user's where the template knows
    no system message; without a template the questions follow as plain text. Raises ValueError for empty
    texts or a missing template.
    """
    if not document.strip():
        raise ValueError("the document is empty")
    for question in questions:
        if not question.strip():
            raise ValueError("a question is empty")
    if not chat:
        return Split(document, tuple(f"\n\nQuestion: {question.strip()}\nAnswer:" for question in questions))
    if assets is None:
        raise ValueError("these params carry no tokenizer and no chat template: ask without chat")
    before, _, after = _conversation(assets, document).rpartition(_QUESTION)
    return Split(
        assets.encode(before, add_special=False),
        tuple(assets.encode(question.strip() + after, add_special=False) for question in questions),
    )


def _conversation(assets: Assets, document: str) -> str:
    user = {"role": "user", "content": _QUESTION}
    one = [{"role": "user", "content": f"{document}\n\n{_QUESTION}"}]
    try:
        text = assets.apply_chat([{"role": "system", "content": document}, user])
    except ValueError:
        return assets.apply_chat(one)
    # a template may also pass over a system message in silence
    return text if document.strip() in text else assets.apply_chat(one)
