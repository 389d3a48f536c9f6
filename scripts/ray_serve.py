"""The server in Ray Serve: each replica is a process with weights, an engine and a cache of its own.

    pip install -e ".[serve]" "ray[serve]"
    MODEL=razor-mini serve run scripts.ray_serve:application        # http://127.0.0.1:8000/v1/chat/completions

A conversation finds its prefix only on the replica that kept it.

Our tests run this file with a stand-in for `ray`, which is not installed there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from ray import serve  # pyright: ignore[reportMissingImports]
from starlette.applications import Starlette
from starlette.routing import Mount

import razor_jax
from razor_jax.server.app import make_app
from razor_jax.server.engine import RazorEngine
from razor_jax.server.service import Service

DRAIN_SECONDS = 30.0


def build() -> Starlette:
    """Return the ASGI application of a replica. Its start compiles, its end lets running answers finish."""
    name = os.environ.get("MODEL", "razor-mini")
    params = razor_jax.load(name)
    assert params.assets is not None, f"{name} has no tokenizer"
    engine = RazorEngine(params, slots=int(os.environ.get("SLOTS", "8")))
    service = Service(engine, params.assets, name, params.config.vocab_size, engine.layout.spec.capacity)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await asyncio.to_thread(engine.start)
        yield
        await asyncio.to_thread(engine.drain, DRAIN_SECONDS)

    server = make_app(service, api_key=os.environ.get("RAZOR_JAX_API_KEY"))
    return Starlette(routes=[Mount("/", server)], lifespan=lifespan)


@serve.deployment(max_ongoing_requests=1000, graceful_shutdown_timeout_s=DRAIN_SECONDS + 10)
@serve.ingress(build)  # called by each replica
class Razor:
    """A replica."""


application = Razor.bind()
