"""Conversion of chat messages to prompt text by a sandboxed jinja template, with the helpers of transformers."""

from __future__ import annotations

import datetime
import functools
import json
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

Message = Mapping[str, Any]  # Role, content, and other fields that the template reads.


def render(
    template: str, messages: Sequence[Message], variables: Mapping[str, Any], *, source: str = "chat template"
) -> str:
    """Return the text of a conversation: `template` rendered with `messages` and `variables`.

    `variables` are the special tokens (`bos_token`, …), `add_generation_prompt` and any other names that the
    template reads. Raises ValueError with `source` (a name for the template) and the line, if the template is broken
    or refuses the messages.
    """
    messages = check_messages(messages)
    try:
        compiled = _compile(template)
        return compiled.render({"tools": None, "documents": None, **variables, "messages": messages})
    except jinja2.TemplateSyntaxError as error:
        raise _failure(source, error.lineno, f"is not valid jinja: {error.message}") from error
    except _Refused as error:
        raise ValueError(
            f"{source}, line {_line(error)}: the template refuses these messages: {error.message}"
        ) from error
    except Exception as error:  # A template is a program and may raise any Python error.
        raise _failure(source, _line(error), f"failed: {type(error).__name__}: {error}") from error


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


class _Refused(jinja2.TemplateError):
    """Error that `raise_exception` raises inside a template."""


class _Generation(jinja2.ext.Extension):
    """Extension that renders `{% generation %} … {% endgeneration %}` (a training mark) as its body."""

    tags = {"generation"}  # noqa: RUF012 — declared so by jinja

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as transformers' `tojson` filter does. The filter of jinja escapes HTML, which changes prompts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _line(error: BaseException) -> int:
    """Return the line of the template that raised the error, 0 if unknown."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno or 0 for frame in reversed(frames) if frame.filename == "<template>"), 0)


def _failure(source: str, line: int, what: str) -> ValueError:
    return ValueError(
        f"{source}, line {line}: the chat template {what}. Correct the template there, or pass a prompt "
        "string instead of messages"
    )
