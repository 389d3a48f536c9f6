"""Responses: one JSON document, or server-sent events in the order of OpenAI's streams.

A stream is, per answer, the role (chat), content, and a piece with the finish reason; then usage with empty choices if
asked for; then `[DONE]`. A fault after the headers is an event `{"error": …}` before `[DONE]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .choice import Choice
from .errors import ApiError
from .exchange import Disconnected, Exchange
from .generation import Finished
from .limits import Limits

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events.
]
_CLOSED = 499  # nginx's status of a request whose client left; nobody reads it.


@dataclasses.dataclass(frozen=True)
class Envelope:
    """Fields round the choices of a response.

    Attributes:
      head: fields of the whole response, or of each chunk of a stream.
      choices: one per answer of the exchange.
      usage: from the ends of all answers.
      include_usage: send usage as the last chunk of a stream.
    """

    head: dict[str, Any]
    choices: Sequence[Choice]
    usage: Callable[[Sequence[Finished]], dict[str, Any]]
    include_usage: bool = False

    def chunk(self, piece: dict[str, Any]) -> dict[str, Any]:
        """Return a chunk with one piece."""
        return {**self.head, "choices": [piece], **({"usage": None} if self.include_usage else {})}


async def answer_whole(exchange: Exchange, envelope: Envelope, receive: Receive, limits: Limits) -> Response:
    """Return the response with all answers. Raises ApiError if one of them fails."""
    async with exchange, _watching(exchange, receive):
        exchange.submit()
        try:
            async for _ in _pieces(exchange, envelope, limits):
                pass
        except Disconnected:
            return Response(status_code=_CLOSED)
    body = {
        **envelope.head,
        "choices": [choice.whole() for choice in envelope.choices],
        "usage": envelope.usage(_ends(exchange)),
    }
    return JSONResponse(body)


class EventStream(Response):
    """A streamed response. The answers are in the queue before it starts."""

    def __init__(self, exchange: Exchange, envelope: Envelope, limits: Limits):
        self._exchange, self._envelope, self._limits = exchange, envelope, limits
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange, limits = self._exchange, self._limits
        async with exchange, _watching(exchange, receive):
            await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            # Without the last message the server closes the connection.
            with contextlib.suppress(Disconnected, TimeoutError):
                async for data in self._lines():
                    # A client that reads nothing blocks `send` once the buffers of the connection are full.
                    async with asyncio.timeout(limits.send_seconds):
                        await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[bytes]:
        envelope = self._envelope
        try:
            async for piece in _pieces(self._exchange, envelope, self._limits):
                yield b": keep-alive\n\n" if piece is None else _event(envelope.chunk(piece))
            if envelope.include_usage:
                yield _event({**envelope.head, "choices": [], "usage": envelope.usage(_ends(self._exchange))})
        except ApiError as error:
            yield _event(error.body)
        yield b"data: [DONE]\n\n"


async def _pieces(exchange: Exchange, envelope: Envelope, limits: Limits) -> AsyncIterator[dict[str, Any] | None]:
    """Yield the pieces of all answers as they come, None after a silence."""
    for choice in envelope.choices:
        if (first := choice.begin()) is not None:
            yield first
    deadline = asyncio.get_running_loop().time() + limits.request_seconds
    async for event in exchange.events(deadline, limits.keep_alive_seconds):
        if event is None:
            yield None
            continue
        for piece in _visible(envelope.choices[event[0]], event[1]):
            yield piece


def _visible(choice: Choice, news: Any) -> Iterator[dict[str, Any]]:
    if isinstance(news, Finished):
        yield from choice.end(news)
    elif (piece := choice.grow(news)) is not None:
        yield piece


def _ends(exchange: Exchange) -> list[Finished]:
    return [exchange.finished[index] for index in range(len(exchange.generations))]


def _event(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


@contextlib.asynccontextmanager
async def _watching(exchange: Exchange, receive: Receive) -> AsyncIterator[None]:
    """Tell the exchange when the client disconnects."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        exchange.disconnect()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
