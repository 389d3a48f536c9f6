"""Tools that a model may call: their checks, the calls in an answer's text, and grammars that force a call.

Two ways of writing a call are known:

- "hermes" (Qwen2.5, Qwen3, Hermes): `<tool_call>` {"name": …, "arguments": {…}} `</tool_call>`, also amid text.
- "llama3" (Llama 3.1, 3.3): the whole answer is {"name": …, "parameters": {…}}, several separated by ";".
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, Literal

from ..tokenizer.assets import find_stop
from .errors import ApiError
from .fields import Fields, short
from .grammar import JSON_OPTIONS, Grammars, object_schema

Format = Literal["hermes", "llama3"]
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON = "<|python_tag|>"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call in an answer. `arguments` is JSON text of an object."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class Tools:
    """Tools of a request.

    Attributes:
      functions: definitions as the client gave them, which the template prints; () with tool_choice "none".
      format: how the model writes a call, None without tools.
      grammar: grammar that forces a call, None if the model may choose.
    """

    functions: tuple[Any, ...] = ()
    format: Format | None = None
    grammar: str | None = None


def read_tools(fields: Fields, template: str | None, grammars: Grammars) -> Tools:
    """Return the tools of a request. Raises ApiError for wrong ones, and for a template without tools."""
    tools, choice = fields.get("tools", []), fields.get("tool_choice", "auto" if fields.get("tools") else "none")
    schemas = _schemas(tools)
    chosen = _chosen(choice, schemas)
    if choice == "none":
        return Tools()
    form = find_format(template)
    if form is None:
        message = "the chat template of this model writes no tool calls that this server reads: leave tools out"
        raise ApiError(message, param="tools", code="unsupported_parameter")
    grammar = None if choice == "auto" else _grammar(grammars, form, chosen, choice == "required")
    return Tools(tuple(tools), form, grammar)


def find_format(template: str | None) -> Format | None:
    """Return how a model with this chat template writes a call, None if it has no tools or writes them otherwise."""
    if template is None or "tools" not in template or "<function=" in template:
        return None
    if _OPEN in template:
        return "hermes"
    return "llama3" if '"parameters"' in template else None


def _schemas(tools: Any) -> dict[str, Any]:
    """Return the JSON schema of the parameters of each tool, by name."""
    schemas: dict[str, Any] = {}
    if not isinstance(tools, list):
        raise ApiError(f"tools={short(tools)}: must be a list", param="tools", code="invalid_value")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        name = function.get("name") if isinstance(function, dict) else None
        parameters = function.get("parameters") if isinstance(function, dict) else None
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(parameters, dict | None):
            allowed = '{"type": "function", "function": {"name": …, "parameters": {…}}}'
            raise ApiError(f"tools[{index}]={short(tool)}: must be {allowed}", param="tools", code="invalid_value")
        if name in schemas:
            raise ApiError(f"two tools have the name {name!r}: give each its own", param="tools", code="invalid_value")
        schemas[name] = parameters or {"type": "object"}
    return schemas


def _chosen(choice: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas of the tools that a call may name."""
    named = isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("function"), dict)
    name = choice["function"].get("name") if named else None
    known = isinstance(name, str) and name in schemas
    if (choice not in ("none", "auto", "required") and not known) or (not schemas and choice != "none"):
        allowed = "none, auto, required, or a function" + (f" of {', '.join(schemas)}" if schemas else "; give tools")
        message = f"tool_choice={short(choice)}: must be {allowed}"
        raise ApiError(message, param="tool_choice", code="invalid_value")
    return schemas if name is None else {name: schemas[name]}


def _grammar(grammars: Grammars, form: Format, schemas: dict[str, Any], several: bool) -> str:
    key = "arguments" if form == "hermes" else "parameters"
    calls = [object_schema({"name": {"const": name}, key: schema}, ["name", key]) for name, schema in schemas.items()]
    for schema in schemas.values():
        grammars.json_schema(schema, "tools")  # For an error about the client's own schema.
    rule = f"call: %json {json.dumps({'anyOf': calls, 'x-guidance': JSON_OPTIONS})}"
    if form == "llama3":
        return grammars.lark(f"start: call\n{rule}", "tools")
    more = r' ("\n" block)*' if several else ""
    block = rf'block: "{_OPEN}\n" call "\n{_CLOSE}"'
    return grammars.lark(f"start: block{more}\n{block}\n{rule}", "tools")


class CallParser:
    """Parser of an answer's text as it grows. The pieces do not depend on how the text was cut."""

    def __init__(self, form: Format | None):
        self._form, self._left, self._whole = form, "", form == "llama3"
        self._called = False

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Append text; return the content and the calls that it completes."""
        if self._form is None:
            return text, []
        self._left += text
        if self._form == "llama3":
            return self._push_llama(), []
        content, calls = "", []
        while True:
            if not self._left.startswith(_OPEN):
                at, safe = find_stop(self._left, [_OPEN])
                content += self._take_content(safe, before_call=at is not None)
                if at is None:
                    return content, calls
            end = self._left.find(_CLOSE)
            if end < 0:
                return content, calls
            whole, self._left = self._left[: end + len(_CLOSE)], self._left[end + len(_CLOSE) :]
            call = parse_call(whole[len(_OPEN) : -len(_CLOSE)])
            self._called |= call is not None
            if call is None:
                content += whole
            else:
                calls.append(call)

    def flush(self) -> tuple[str, list[ToolCall]]:
        """Return content and calls in the text that is left, at its end."""
        left, self._left = self._left, ""
        if self._form == "llama3" and self._whole:
            parts = [parse_call(part) for part in _split(left.strip().removeprefix(_PYTHON))]
            if parts and None not in parts:
                return "", [part for part in parts if part is not None]
            return left, []
        if self._form == "hermes" and left.startswith(_OPEN) and (call := parse_call(left[len(_OPEN) :])):
            return "", [call]
        return ("" if self._called and not left.strip() else left), []

    def _push_llama(self) -> str:
        """Return the content of an answer that is no call."""
        start = self._left.lstrip()
        self._whole = self._whole and (start[:1] in ("", "{") or _PYTHON.startswith(start[: len(_PYTHON)]))
        if self._whole:
            return ""
        left, self._left = self._left, ""
        return left

    def _take_content(self, safe: int, before_call: bool) -> str:
        """Return text outside of calls. White space waits for what follows it: a call swallows it."""
        content = self._left[:safe]
        shown = content.rstrip()
        self._left = self._left[safe if before_call else len(shown) :]
        return shown


def parse_call(text: str) -> ToolCall | None:
    """Return the call {"name": …, "arguments" or "parameters": {…}}, None if the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


def _split(text: str) -> Sequence[str]:
    """Split JSON objects that are separated by ";"."""
    parts, decoder, at = [], json.JSONDecoder(), 0
    while at < len(text):
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return [text]
        parts.append(text[at:end])
        rest = text[end:].lstrip(" ;\n")
        at = len(text) - len(rest)
    return parts
