"""Limits on what one client can take from the others."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from .errors import ApiError


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
      body_bytes: longest body.
      body_seconds: longest time in which a body arrives.
      answers: most answers of a request, prompts times n.
      new_tokens: `max_tokens` of a chat answer whose request has none. Admission reserves pages for all of them.
      request_seconds: longest time from the request to the end of its answers.
      send_seconds: longest time that a client may leave a piece of a streamed answer unread once buffers are full.
      keep_alive_seconds: time without a piece after which a stream sends a comment, so that proxies keep it open.
    """

    body_bytes: int = 32 * 2**20
    body_seconds: float = 60.0
    answers: int = 128
    new_tokens: int = 1024
    request_seconds: float = 600.0
    send_seconds: float = 60.0
    keep_alive_seconds: float = 10.0


async def read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """Return the JSON object in the body of a request. Raises ApiError, and ClientDisconnect."""
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _read(request, limits.body_bytes)
    except TimeoutError:
        message = f"the body did not arrive within {limits.body_seconds:g} seconds"
        raise ApiError(message, status=408) from None
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(f"the body is a JSON {type(value).__name__}: give an object")
    return value


async def _read(request: Request, limit: int) -> bytes:
    message = f"the body has more than {limit:,} bytes: shorten the prompt"
    too_long = ApiError(message, status=413, code="body_too_large")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > limit:
        raise too_long
    pieces, size = [], 0
    async for piece in request.stream():
        pieces.append(piece)
        size += len(piece)
        if size > limit:
            raise too_long
    return b"".join(pieces)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


__all__ = ("ClientDisconnect", "Limits", "read_json")
