"""A real uvicorn on loopback in a thread, with a scripted engine behind the application."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import uvicorn

from razor_jax import Assets
from razor_jax.server.app import make_app
from razor_jax.server.service import Service

from .scripted_engine import ScriptedEngine


@dataclasses.dataclass
class Running:
    """A server that runs, its engine, and clients of it."""

    url: str
    engine: Any
    service: Service
    http: httpx.Client

    def openai(self, **options: Any) -> openai.OpenAI:
        """A client whose connections are those of `http`."""
        known = {"api_key": "none", "max_retries": 0, "http_client": self.http}
        return openai.OpenAI(base_url=f"{self.url}/v1", **{**known, **options})

    def wait_until(self, holds: Any, seconds: float = 60.0) -> None:
        """Wait until `holds()`; fail after some seconds."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, "did not happen in time"
            time.sleep(0.005)

    def wait_idle(self) -> None:
        """Wait until no answer is live and all pages are free."""
        self.wait_until(lambda: self.engine.stats().running + self.engine.stats().waiting == 0)
        assert not any(self.engine.stats().pages_used)


@contextlib.contextmanager
def serve(
    engine: Any,
    assets: Assets,
    vocab_size: int,
    max_model_len: int = 4096,
    *,
    send_buffer: int | None = None,
    **options: Any,
) -> Iterator[Running]:
    """Serve an engine that has started; it is drained at the end. Options are those of Service and make_app.

    `send_buffer`: bytes that the kernel holds of each response.
    """
    of_app = {name: options.pop(name) for name in ("api_key", "origins") if name in options}
    service = Service(engine, assets, "scripted", vocab_size, max_model_len, **options)
    config = uvicorn.Config(make_app(service, **of_app), log_level="error", lifespan="off", ws="none", loop="asyncio")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener, _client(listener) as client:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # Connections inherit it.
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        running = Running(str(client.base_url), engine, service, client)
        try:
            running.wait_until(lambda: server.started)
            yield running
        finally:
            engine.drain(5)
            server.should_exit = True
            thread.join(60)
            service.tokenizer.close()
    assert not thread.is_alive()


def _client(listener: socket.socket) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60, trust_env=False)


@contextlib.contextmanager
def serve_script(assets: Assets, vocab_size: int, *, slots: int = 8, **options: Any) -> Iterator[Running]:
    """Serve a scripted engine."""
    waiting = options.pop("max_waiting", 1024)
    engine = ScriptedEngine(assets, slots=slots, capacity=options.get("max_model_len", 4096), max_waiting=waiting)
    engine.start()
    with serve(engine, assets, vocab_size, **options) as running:
        yield running
