"""POST /v1/chat/completions"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..text.logprobs import MAX_LOGPROBS
from ..tokenizer.assets import Assets
from .choice import chat_logprob, usage
from .errors import ApiError
from .events import Envelope, EventStream, answer_whole
from .fields import Fields
from .generation import Delta, Finished, Generation
from .protocol import SHARED_FIELDS, Options, check_fits, make_generations, read_options
from .service import Service, new_id
from .tools import CallParser, Tools, read_tools

_FIELDS = SHARED_FIELDS | {
    "messages",
    "max_completion_tokens",
    "top_logprobs",
    "tools",
    "tool_choice",
    "chat_template_kwargs",
}


async def answer(service: Service, request: Request) -> Response:
    """Answer a conversation."""
    fields = await service.read(request, _FIELDS)
    service.require_ready()
    id = new_id("chatcmpl")
    options, tools, generations = await service.tokenizer.off_loop(lambda: _read(service, fields, id))
    exchange = service.exchange(generations)
    choices = [ChatChoice(index, service.assets, generation, tools) for index, generation in enumerate(generations)]
    envelope = Envelope(
        service.head(id, "chat.completion.chunk" if options.stream else "chat.completion"),
        choices,
        functools.partial(usage, 1, options.n),
        options.include_usage,
    )
    if not options.stream:
        return await answer_whole(exchange, envelope, request.receive, service.limits)
    exchange.submit()
    return EventStream(exchange, envelope, service.limits)


def _read(service: Service, fields: Fields, id: str) -> tuple[Options, Tools, list[Generation]]:
    """Return what a request asks for. Raises ApiError."""
    options = read_options(fields, service.grammars, service.assets, service.vocab_size, service.max_model_len)
    logprobs = _logprobs(fields)
    tools = read_tools(fields, service.assets.chat_template, service.grammars)
    if tools.grammar is not None and options.grammar is not None:
        message = "tool_choice forces a call, and response_format something else: give one of them"
        raise ApiError(message, param="response_format", code="invalid_value")
    options = dataclasses.replace(options, grammar=tools.grammar or options.grammar)
    if options.max_tokens == 0:
        raise ApiError("max_tokens=0: must be at least 1", param="max_tokens", code="invalid_value")
    variables = fields.mapping("chat_template_kwargs")
    prompt = service.prompts.of_chat(fields.get("messages"), tools.functions, variables)
    max_tokens = options.max_tokens or min(service.limits.new_tokens, service.max_model_len - len(prompt.tokens))
    check_fits([prompt], max_tokens, service.max_model_len)
    return options, tools, make_generations(id, [prompt], options, service.grammars, max_tokens, logprobs=logprobs)


def _logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", 0, 0, MAX_LOGPROBS)
    if fields.boolean("logprobs"):
        return top
    if "top_logprobs" in fields:
        raise ApiError("top_logprobs without logprobs: true", param="top_logprobs", code="invalid_value")
    return None


class ChatChoice:
    """An answer of a conversation. Satisfies `choice.Choice`."""

    def __init__(self, index: int, assets: Assets, generation: Generation, tools: Tools):
        self._index, self._assets = index, assets
        self._parser = CallParser(tools.format)
        self._logprobs: list[dict[str, Any]] | None = None if generation.logprobs is None else []
        self._content = ""
        self._calls: list[dict[str, Any]] = []
        self._reason = ""

    def begin(self) -> dict[str, Any]:
        """Return the piece with the role."""
        return self._piece({"role": "assistant", "content": ""}, None)

    def grow(self, delta: Delta) -> dict[str, Any] | None:
        """Return a piece with content, calls or log probabilities."""
        logprobs = [chat_logprob(self._assets, each) for each in delta.logprobs]
        if self._logprobs is not None:
            self._logprobs += logprobs
        return self._grown(*self._parser.push(delta.text), logprobs)

    def end(self, finished: Finished) -> list[dict[str, Any]]:
        """Return what was left, and the piece with the finish reason."""
        left = self._grown(*self._parser.flush(), [])
        self._reason = "tool_calls" if self._calls else finished.reason
        return [*([left] if left else []), {**self._piece({}, None), "finish_reason": self._reason}]

    def whole(self) -> dict[str, Any]:
        """Return the answer as a message."""
        message: dict[str, Any] = {"role": "assistant", "content": self._content, "refusal": None}
        if self._calls:
            calls = [{name: value for name, value in call.items() if name != "index"} for call in self._calls]
            message |= {"content": self._content or None, "tool_calls": calls}
        logprobs = None if self._logprobs is None else {"content": self._logprobs}
        return {"index": self._index, "message": message, "logprobs": logprobs, "finish_reason": self._reason}

    def _grown(self, content: str, calls: list[Any], logprobs: list[dict[str, Any]]) -> dict[str, Any] | None:
        self._content += content
        named = [
            {
                "index": len(self._calls) + offset,
                "id": new_id("call"),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for offset, call in enumerate(calls)
        ]
        self._calls += named
        if not content and not named and not logprobs:
            return None
        delta = {**({"content": content} if content or not named else {}), **({"tool_calls": named} if named else {})}
        return self._piece(delta, {"content": logprobs} if logprobs else None)

    def _piece(self, delta: dict[str, Any], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
