"""Run the application in this process until a signal ends it."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from .service import Service

_log = logging.getLogger(__name__)
_CLOSE_SECONDS = 5.0  # For the last bytes of responses, after the answers have ended.


def run(
    service: Service, app: Starlette, host: str, port: int, drain_seconds: float, on_listening: Callable[[str], None]
) -> int:
    """Start the engine, serve HTTP, and return the exit code: 0 after SIGTERM or SIGINT, 1 if the engine failed.

    The server listens while the engine compiles: /health answers, and /ready says when it takes requests. A signal ends
    that: running answers finish within `drain_seconds`. A second signal ends them at once.

    Args:
      port: 0 for any free port.
      on_listening: called with the address.
    """
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(_CLOSE_SECONDS),
    )
    listener = _listen(host, port)
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    on_listening(f"http://{shown}:{address[1]}")
    server = _Server(config, service, drain_seconds)
    # The program may watch signals by its own file descriptor; here the server handles them.
    watched = signal.set_wakeup_fd(-1)
    with listener:
        server.run(sockets=[listener])
    signal.set_wakeup_fd(watched)
    service.tokenizer.close()
    if server.busy:
        os._exit(0)  # Nothing else ends a program that runs or compiles.
    return 1 if server.failed else 0


def _listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError that names the address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error}): choose another --host or --port") from error


class _Server(uvicorn.Server):
    """A server that starts the engine, and drains it before it closes connections."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float):
        super().__init__(config)
        self.failed = False
        self._service, self._drain_seconds = service, drain_seconds
        self._starting = threading.Thread(target=self._start, name="razor-jax-start", daemon=True)
        self._draining = threading.Thread(target=self._drain, name="razor-jax-drain", daemon=True)

    @property
    def busy(self) -> bool:
        """Whether the engine still compiles, or runs answers that a second signal cut off."""
        return self._starting.is_alive() or self._draining.is_alive()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and start the engine in a thread meanwhile."""
        await super().startup(sockets=sockets)
        self._starting.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain at the first signal, and end at the second.

        uvicorn's own handler raises the signal again at the end, and the exit code would not be 0.
        """
        if self._draining.ident is None:
            name = signal.Signals(sig).name
            _log.info("%s: running answers have %g seconds to finish", name, self._drain_seconds)
            self._draining.start()
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end: also once the engine has ended by itself."""
        if self._service.engine.failure is not None:
            self.failed = True
            return True
        return await super().on_tick(counter)

    def _start(self) -> None:
        try:
            self._service.engine.start()
        except Exception:
            _log.exception("the engine did not start")
            self.failed = self.should_exit = True

    def _drain(self) -> None:
        try:
            if not self._service.engine.drain(self._drain_seconds):
                _log.warning("answers were cut off after %g seconds", self._drain_seconds)
        finally:
            self.should_exit = True
