"""The HTTP application: paths, and what they share. Any ASGI server can mount it.

app = make_app(service)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from . import chat, completions, errors
from .access import BearerKey, RequestId
from .errors import ApiError
from .service import Service

STALL_SECONDS = 60.0  # Age of the last tick from which a busy engine counts as stuck.
_PAGE = Path(__file__).with_name("page.html")
_IDS = 65_536  # Ids that are written at once, so that other requests are answered between.


def make_app(service: Service, *, api_key: str | None = None, origins: Sequence[str] = ()) -> Starlette:
    """Return the application of a service, whose engine its caller starts and drains.

    Args:
      api_key: bearer key that all paths but the page, /health, /ready and /metrics ask for; None for none.
      origins: web origins whose pages may call this server (CORS); none by default.
    """
    endpoints = [
        ("/v1/chat/completions", "POST", chat.answer),
        ("/v1/completions", "POST", completions.answer),
        ("/v1/models", "GET", models),
        ("/v1/models/{name:path}", "GET", model),
        ("/tokenize", "POST", tokenize),
        ("/health", "GET", health),
        ("/ready", "GET", ready),
        ("/metrics", "GET", metrics),
        ("/", "GET", page),
    ]
    middleware = [Middleware(RequestId)]
    if origins:
        middleware.append(
            Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
        )
    if api_key is not None:
        middleware.append(Middleware(BearerKey, key=api_key))
    return Starlette(
        routes=[Route(path, functools.partial(answer, service), methods=[verb]) for path, verb, answer in endpoints],
        middleware=middleware,
        exception_handlers={
            ApiError: errors.on_api_error,
            HTTPException: errors.on_http_error,
            ClientDisconnect: _on_disconnect,
            Exception: errors.on_fault,
        },
    )


async def models(service: Service, request: Request) -> Response:
    """Return the list with the model."""
    return JSONResponse({"object": "list", "data": [_described(service)]})


async def model(service: Service, request: Request) -> Response:
    """Return the model."""
    name = request.path_params["name"]
    if name != service.name:
        message = f"there is no model {name!r} here: the model is {service.name!r}"
        raise ApiError(message, status=404, param="model", code="model_not_found")
    return JSONResponse(_described(service))


async def tokenize(service: Service, request: Request) -> Response:
    """Return the token ids of a text or a conversation."""
    fields = await service.read(request, frozenset({"model", "prompt", "messages", "add_special_tokens"}))
    if ("prompt" in fields) == ("messages" in fields):
        raise ApiError("give either prompt or messages", param="prompt", code="invalid_value")
    text, special = fields.text("prompt"), fields.boolean("add_special_tokens", True)

    def work() -> bytes:
        if text is None:
            return _ids(service, np.asarray(service.prompts.of_chat(fields.get("messages"), None, {}).tokens))
        return _ids(service, service.prompts.encode(text, special))

    return Response(await service.tokenizer.off_loop(work), media_type="application/json")


async def health(service: Service, request: Request) -> Response:
    """Return 200 if a tick made progress lately or there is nothing to do, otherwise 503."""
    if service.engine.failure is not None:
        message = f"the engine has ended and the server ends: {service.engine.failure}"
        raise ApiError(message, status=503, code="engine_failed")
    stats = service.engine.stats()
    busy = stats.running + stats.waiting > 0
    if busy and stats.last_tick_age > STALL_SECONDS:
        message = f"{stats.running + stats.waiting} answers wait, and the last tick was {stats.last_tick_age:.0f} s ago"
        raise ApiError(message, status=503, code="stalled")
    return JSONResponse({"status": "ok"})


async def ready(service: Service, request: Request) -> Response:
    """Return 200 if the programs are compiled and the server does not shut down, otherwise 503."""
    service.require_ready()
    return JSONResponse({"status": "ready"})


async def metrics(service: Service, request: Request) -> Response:
    """Return the metrics for Prometheus."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def page(service: Service, request: Request) -> Response:
    """Return the page to try the model on."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": policy})


def _described(service: Service) -> dict[str, str | int]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "razor_jax",
        "max_model_len": service.max_model_len,
    }


def _ids(service: Service, ids: np.ndarray) -> bytes:
    """Return the JSON answer of /tokenize. `json.dumps` of all ids at once would stop the server for long."""
    parts = (json.dumps(ids[at : at + _IDS].tolist())[1:-1].encode() for at in range(0, len(ids), _IDS))
    head = f'{{"count": {len(ids)}, "max_model_len": {service.max_model_len}, "tokens": ['
    return head.encode() + b", ".join(parts) + b"]}"


def _on_disconnect(request: Request, error: Exception) -> Response:
    """Return a response that nobody reads: the client left while it sent its request."""
    return Response(status_code=499)
