"""Conversion of chat messages to prompt text by the jinja template of a checkpoint, with the helpers of transformers.

A template is a program of a stranger: it runs in a process of its own under limits (`template_process`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .template_process import PROCESS, Stopped

Message = Mapping[str, Any]  # Role, content, and other fields that the template reads.
# A text part that shows whether a template reads the text of parts, or prints parts as they are.
_TEXT, _KEY = "razor-jax-text", "razor-jax-key"
_PART = {"type": "text", "text": _TEXT, _KEY: _KEY}


def render(
    template: str, messages: Sequence[Message], variables: Mapping[str, Any], *, source: str = "chat template"
) -> str:
    """Return the text of a conversation: `template` rendered with `messages` and `variables`.

    `variables` are the special tokens (`bos_token`, …), `add_generation_prompt` and any other names that the
    template reads, as plain JSON data. The text parts of a content are joined if the template reads strings only.
    Raises ValueError with `source` (a name for the template) and the line, if the template is broken, refuses the
    messages, or exceeds a limit on time, memory or length (`template_process`).
    """
    messages = check_messages(messages)
    variables = {"tools": None, "documents": None, **variables}
    try:
        if any(isinstance(message.get("content"), list) for message in messages):
            messages = _join_parts(template, messages, variables)
        answer = PROCESS.render(template, {**variables, "messages": messages})
    except Stopped as error:
        raise _failure(source, 0, f"{error} and was stopped") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"the variables of a chat template must be plain JSON data: {error}") from error
    match answer.get("error"):
        case None:
            return answer["text"]
        case "syntax":
            raise _failure(source, answer["line"], f"is not valid jinja: {answer['message']}")
        case "refused":
            raise ValueError(
                f"{source}, line {answer['line']}: the template refuses these messages: {answer['message']}"
            )
    raise _failure(source, answer["line"], f"failed: {answer['message']}")


def _join_parts(template: str, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages; join the text parts of a role into one string if the template does not read its parts."""
    joined = [
        {**message, "content": "".join(part["text"] for part in message["content"])}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
    reads_parts = {}
    for index, message in enumerate(messages):
        if isinstance(message.get("content"), list) and message["role"] not in reads_parts:
            probe = [*joined[:index], {**message, "content": [_PART]}, *joined[index + 1 :]]
            text = PROCESS.render(template, {**variables, "messages": probe}).get("text", "")
            reads_parts[message["role"]] = _TEXT in text and _KEY not in text
    return [
        message if reads_parts.get(message["role"]) else string
        for message, string in zip(messages, joined, strict=True)
    ]


def check_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the conversation as plain JSON data, the only data that a template may see.

    A message has a `role` and a `content`: a string or a list of `{"type": "text", "text": …}`. A message with
    `tool_calls` may lack content. Raises ValueError for any other message.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"chat messages must be a list of dictionaries, not {type(messages).__name__}")
    if not messages:
        raise ValueError('no chat messages: pass at least one, such as {"role": "user", "content": "Hello"}')
    for index, message in enumerate(messages):
        _check_message(f"chat message {index}", message)
    try:
        return json.loads(json.dumps([dict(message) for message in messages]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"chat messages must be plain JSON data: {error}") from error


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {message!r}: must be a dictionary with `role` and `content`")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where} has role {role!r}: must be a string such as system, user or assistant")
    if content is None and "tool_calls" in message:
        return
    parts = content if isinstance(content, list) else [] if isinstance(content, str) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise ValueError(
            f'{where} ({role}) has content {content!r}: must be a string or a list of {{"type": "text", '
            '"text": …}; this library reads text only'
        )


def text_of(message: Message) -> str:
    """Return the content of a message as one text."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _failure(source: str, line: int, what: str) -> ValueError:
    where = f"{source}, line {line}" if line else source
    return ValueError(
        f"{where}: the chat template {what}. Correct the template there, or pass text with raw=True, which uses none"
    )
