"""Middleware: the bearer key, and an id of each request. Pure ASGI, so that streams and disconnects pass unchanged."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

_OPEN = ("/", "/health", "/ready", "/metrics")
_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class BearerKey:
    """Refuse requests without `Authorization: Bearer KEY`, except to the page, health and metrics."""

    def __init__(self, app: ASGIApp, key: str):
        self._app, self._digest = app, hashlib.sha256(key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A server that mounts the application under a path keeps that path in `path`.
        open_to_all = scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) in _OPEN
        if not open_to_all and not self._allowed(Headers(scope=scope)):
            error = ApiError("wrong or missing key: send Authorization: Bearer KEY", status=401, code="invalid_api_key")
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _allowed(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # Digests have equal lengths, so the time tells nothing, not even the length of the key.
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        return hmac.compare_digest(digest, self._digest) and scheme.lower() == "bearer"


class RequestId:
    """Send `x-request-id` back: the client's, or a new one. It names nothing inside the server, so it may repeat."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}".encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", id)]}
            await send(message)

        await self._app(scope, receive, send_with_id)
