"""Prompts of requests as token ids, and the places in them whose cache is worth keeping."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import ApiError
from .fields import short
from .tokenize import Tokenizer

# Two texts that end a common start: one of them differs from whatever follows it.
_PROBES = ("0", "x")
# A shorter system prompt is cheaper to read again than to keep, and would fix the window of a long prompt behind it.
MIN_SYSTEM_TOKENS = 256
_LONGEST_WORD = 64
_LAST_WORD = re.compile(rf"(?<!\s)\s+\S{{1,{_LONGEST_WORD}}}\s*\Z")
_ROLES = ("system", "user", "assistant", "tool")
_KEPT = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
      tokens: ids, at least one.
      checkpoints: as in `Generation`.
      text: text of the tokens if it was given as text.
    """

    tokens: tuple[int, ...]
    checkpoints: tuple[int, ...] = ()
    text: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Maker of prompts for one model.

    Attributes:
      vocab_size: V of the model.
      max_model_len: most tokens of prompt and answer.
    """

    tokenizer: Tokenizer
    vocab_size: int
    max_model_len: int

    def of_chat(self, messages: Any, tools: Sequence[Any] | None, variables: Mapping[str, Any]) -> Prompt:
        """Return the prompt of a conversation by the model's chat template. Raises ApiError."""
        messages = check_messages(messages)
        variables = {**variables, **({"tools": tools} if tools else {})}
        try:
            text = self._render(_plain(messages), variables)
            tokens = self.tokenizer.encode(text, False)
        except ValueError as error:
            raise ApiError(str(error), param="messages") from None
        prompt = self._checked(tokens, "messages")
        system, marked = _starts(messages)
        ends = {self._common_start(text, tokens, start, variables) for start in marked}
        if system and (end := self._common_start(text, tokens, system, variables)) >= MIN_SYSTEM_TOKENS:
            ends.add(end)
        return dataclasses.replace(prompt, checkpoints=tuple(sorted(ends - {0, len(prompt.tokens)})))

    def of_completion(self, prompt: Any) -> list[Prompt]:
        """Return the prompts of a string, a list of strings, token ids, or a list of those. Raises ApiError."""
        several = isinstance(prompt, list) and bool(prompt) and all(isinstance(each, str | list) for each in prompt)
        return [self._of_item(each) for each in (prompt if several else [prompt])]

    def _of_item(self, item: Any) -> Prompt:
        if isinstance(item, str):
            return dataclasses.replace(self._checked(self.encode(item), "prompt"), text=item)
        if isinstance(item, list) and all(type(token) is int for token in item):
            bad = next((token for token in item if not 0 <= token < self.vocab_size), None)
            if bad is not None:
                message = f"token id {bad} is outside the vocabulary 0..{self.vocab_size - 1}"
                raise ApiError(message, param="prompt", code="invalid_value")
            return self._checked(np.asarray(item, np.int32), "prompt")
        raise ApiError(
            f"prompt={short(item)}: must be text, a list of texts, a list of token ids, or a list of those",
            param="prompt",
            code="invalid_value",
        )

    def encode(self, text: str, add_special: bool = True, param: str = "prompt") -> np.ndarray:
        """Return the token ids of a text. Raises ApiError for text that is not Unicode."""
        try:
            return self.tokenizer.encode(text, add_special)
        except ValueError as error:
            raise ApiError(str(error), param=param) from None

    def _checked(self, tokens: np.ndarray, param: str) -> Prompt:
        if not len(tokens):
            raise ApiError(f"{param} is empty: give at least one token", param=param, code="invalid_value")
        if len(tokens) >= self.max_model_len:
            raise ApiError(
                f"{param} has {len(tokens):,} tokens, but prompt and answer may have {self.max_model_len:,}: "
                "shorten it",
                param=param,
                code="context_length_exceeded",
            )
        return Prompt(tuple(tokens.tolist()))

    def _render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        return self.tokenizer.assets.apply_chat(messages, variables=variables)

    def _common_start(
        self, text: str, tokens: np.ndarray, start: list[dict[str, Any]], variables: Mapping[str, Any]
    ) -> int:
        """Return the number of first tokens that a conversation shares with all that start with `start`."""
        common = len(text)
        for probe in _PROBES:
            try:
                other = self._render(_plain(_with_text(start, probe)), variables)
            except ValueError:  # The template does not take such a conversation.
                return 0
            common = min(common, _common_length(text, other))
        head = self.tokenizer.encode(text[: _before_last_word(text, common)], False)
        both = min(len(head), len(tokens))
        different = np.flatnonzero(head[:both] != tokens[:both])
        return int(different[0]) if len(different) else both


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Return messages as a chat template reads them, with the marks of their parts. Raises ApiError."""
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", messages, 'a non-empty list of {"role": "user", "content": "…"}')
    return [_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _wrong(where, message, 'an object {"role": "user", "content": "…"}')
    message = {name: value for name, value in message.items() if value not in (None, [], {})}
    for name in message:
        if name not in _KEPT:
            raise _wrong(f"{where}.{name}", message[name], f"absent; a message has {', '.join(_KEPT)}")
    role = "system" if message.get("role") == "developer" else message.get("role")
    if role not in _ROLES:
        raise _wrong(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
    content = message.get("content", "" if "tool_calls" in message else None)
    if isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(f"{where}.content[{index}]", part)
    elif not isinstance(content, str):
        raise _wrong(f"{where}.content", content, "a string or a list of text parts")
    calls = {"tool_calls": _tool_calls(f"{where}.tool_calls", message["tool_calls"])} if "tool_calls" in message else {}
    return {**message, "role": role, "content": content, **calls}


def _check_part(where: str, part: Any) -> None:
    allowed = '{"type": "text", "text": "…"}, with "cache": true to keep the cache up to its end'
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise _wrong(where, part, allowed)
    control = part.get("cache_control")
    for name in part:
        if name not in ("type", "text", "cache", "cache_control"):
            raise _wrong(f"{where}.{name}", part[name], f"absent; a part is {allowed}")
    if not isinstance(part.get("cache", False), bool):
        raise _wrong(f"{where}.cache", part["cache"], "true or false")
    if control is not None and (not isinstance(control, dict) or control.get("type") != "ephemeral"):
        raise _wrong(f"{where}.cache_control", control, '{"type": "ephemeral"}')


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Return calls with their arguments as objects, which templates print."""
    if not isinstance(calls, list):
        raise _wrong(where, calls, "a list")
    parsed = []
    for index, call in enumerate(calls):
        try:
            function = call["function"]
            arguments = function["arguments"]
            arguments = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
            if not isinstance(function["name"], str) or not isinstance(arguments, dict):
                raise TypeError
        except (KeyError, TypeError, ValueError):
            allowed = '{"id": …, "type": "function", "function": {"name": …, "arguments": "{…}"}}'
            raise _wrong(f"{where}[{index}]", call, allowed) from None
        parsed.append({**call, "function": {**function, "arguments": arguments}})
    return parsed


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages without the marks of their parts."""
    return [
        {**message, "content": [{"type": "text", "text": part["text"]} for part in message["content"]]}
        if isinstance(message["content"], list)
        else dict(message)
        for message in messages
    ]


def _starts(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Return the starts worth keeping: the system messages ([] without them), and up to each marked part."""
    first = next((index for index, each in enumerate(messages) if each["role"] != "system"), len(messages))
    system = [*messages[:first], {"role": "user", "content": ""}] if first else []
    marked = [
        [*messages[:index], {**message, "content": message["content"][: end + 1]}]
        for index, message in enumerate(messages)
        if isinstance(message["content"], list)
        for end, part in enumerate(message["content"])
        if part.get("cache") or part.get("cache_control")
    ]
    return system, marked


def _with_text(start: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Return a conversation whose last message continues with `text`."""
    content = start[-1]["content"]
    more = content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}]
    return [*start[:-1], {**start[-1], "content": more}]


def _before_last_word(text: str, end: int) -> int:
    """Return where the last word of text[:end] begins, with the white space before it; `end` without such a word.

    What follows `end` may join its last word or white space in one token, and then another question has another start.
    """
    tail = text[max(0, end - 2 * _LONGEST_WORD) : end]
    match = _LAST_WORD.search(tail)
    return end if match is None else end - len(tail) + match.start()


def _common_length(one: str, other: str) -> int:
    """Return the length of the longest common start of two texts."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        # Only the part that is not known: each step halves it.
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def _wrong(where: str, value: Any, allowed: str) -> ApiError:
    return ApiError(f"{where}={short(value)}: must be {allowed}", param=where, code="invalid_value")
