"""POST /v1/completions"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..text.logprobs import MAX_LOGPROBS, TokenLogprob
from ..tokenizer.assets import Assets
from .choice import completion_token, finite, usage
from .errors import ApiError
from .events import Envelope, EventStream, answer_whole
from .fields import Fields
from .generation import Delta, Finished, Generation
from .prompt import Prompt
from .protocol import SHARED_FIELDS, Options, check_fits, make_generations, read_options
from .service import Service, new_id

_FIELDS = SHARED_FIELDS | {"prompt", "echo"}
_NEW_TOKENS = 16  # max_tokens of a request without one, as OpenAI has it.


async def answer(service: Service, request: Request) -> Response:
    """Complete texts or token ids."""
    fields = await service.read(request, _FIELDS)
    service.require_ready()
    id = new_id("cmpl")
    options, prompts, generations = await service.tokenizer.off_loop(lambda: _read(service, fields, id))
    exchange = service.exchange(generations)
    # An echo without new tokens still runs one step, which reads the prompt.
    hidden = 1 if options.max_tokens == 0 else 0
    choices = [
        TextChoice(index, service.assets, generation, _echo(service, fields, prompts[index // options.n]), bool(hidden))
        for index, generation in enumerate(generations)
    ]
    envelope = Envelope(
        service.head(id, "text_completion"),
        choices,
        functools.partial(usage, len(prompts), options.n, hidden=hidden),
        options.include_usage,
    )
    if not options.stream:
        return await answer_whole(exchange, envelope, request.receive, service.limits)
    exchange.submit()
    return EventStream(exchange, envelope, service.limits)


def _read(service: Service, fields: Fields, id: str) -> tuple[Options, list[Prompt], list[Generation]]:
    """Return what a request asks for. Raises ApiError."""
    options = read_options(fields, service.grammars, service.assets, service.vocab_size, service.max_model_len)
    logprobs = fields.integer("logprobs", None, 0, MAX_LOGPROBS)
    echo = fields.boolean("echo")
    if options.max_tokens == 0 and not echo:
        message = "max_tokens=0: must be at least 1, or give echo: true"
        raise ApiError(message, param="max_tokens", code="invalid_value")
    if "prompt" not in fields:
        raise ApiError("prompt is missing: give text or token ids", param="prompt", code="missing_field")
    prompts = service.prompts.of_completion(fields.get("prompt"))
    max_tokens = _NEW_TOKENS if options.max_tokens is None else max(1, options.max_tokens)
    check_fits(prompts, max_tokens, service.max_model_len)
    common = {"logprobs": logprobs, "prompt_logprobs": echo and logprobs is not None}
    return options, prompts, make_generations(id, prompts, options, service.grammars, max_tokens, **common)


def _echo(service: Service, fields: Fields, prompt: Prompt) -> str | None:
    """Return the text to echo, None if the request has no echo."""
    if not fields.get("echo"):
        return None
    return service.assets.decode(prompt.tokens) if prompt.text is None else prompt.text


class TextChoice:
    """An answer that continues a text. Satisfies `choice.Choice`."""

    def __init__(self, index: int, assets: Assets, generation: Generation, echo: str | None, echo_only: bool):
        self._index, self._assets, self._echo, self._echo_only = index, assets, echo, echo_only
        self._prompt = generation.prompt if generation.prompt_logprobs else ()
        self._text = ""
        self._logprobs = None if generation.logprobs is None else _Logprobs(assets)
        self._reason = ""

    def begin(self) -> None:
        """Return None: the echo comes with the first delta, which has its log probabilities."""
        return

    def grow(self, delta: Delta) -> dict[str, Any] | None:
        """Return a piece with text or log probabilities."""
        echo, self._echo = self._echo or "", None
        text = echo if self._echo_only else echo + delta.text
        piece = None
        if self._logprobs is not None:
            logprobs: list[TokenLogprob | int] = []
            if self._prompt:
                logprobs += [self._prompt[0], *delta.prompt_logprobs]
                self._prompt = ()
            piece = self._logprobs.add(logprobs + ([] if self._echo_only else list(delta.logprobs)))
        self._text += text
        return self._piece(text, piece) if text or piece else None

    def end(self, finished: Finished) -> list[dict[str, Any]]:
        """Return the piece with the finish reason."""
        left = self.grow(Delta("", ())) if self._echo is not None else None
        self._reason = "length" if self._echo_only else finished.reason
        return [*([left] if left else []), {**self._piece("", None), "finish_reason": self._reason}]

    def whole(self) -> dict[str, Any]:
        """Return the answer."""
        logprobs = None if self._logprobs is None else self._logprobs.all
        return {"index": self._index, "text": self._text, "logprobs": logprobs, "finish_reason": self._reason}

    def _piece(self, text: str, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": None}


class _Logprobs:
    """Log probabilities of an answer in the form of completion responses: a list per field."""

    def __init__(self, assets: Assets):
        self._assets, self._offset = assets, 0
        self.all: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, tokens: Sequence[TokenLogprob | int]) -> dict[str, Any] | None:
        """Return the lists of these tokens, None without any. The first token of a prompt, an int, has none."""
        piece: dict[str, Any] = {name: [] for name in self.all}
        for each in tokens:
            token = each if isinstance(each, int) else each.token
            text = completion_token(self._assets, token)
            piece["tokens"].append(text)
            piece["token_logprobs"].append(None if isinstance(each, int) else finite(each.logprob))
            piece["top_logprobs"].append(None if isinstance(each, int) else self._top(each))
            piece["text_offset"].append(self._offset)
            self._offset += len(text)
        for name, values in piece.items():
            self.all[name] += values
        return piece if tokens else None

    def _top(self, each: TokenLogprob) -> dict[str, float]:
        return {completion_token(self._assets, token): finite(logprob) for token, logprob in each.top}
