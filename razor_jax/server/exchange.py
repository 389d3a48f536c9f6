"""The answers of one request, carried from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Sequence

from .errors import ApiError, from_refusal
from .generation import Delta, Engine, Finished, Generation, Refused
from .metrics import RequestTimes

Event = tuple[int, Delta | Finished]


class Disconnected(Exception):
    """The client is gone: nobody reads the answers."""


class Exchange:
    """Answers of a request as they grow.

    The engine never waits for a client: growth that nobody has taken yet is joined to one `Delta` per answer, so a slow
    client costs at most the answers themselves. Leaving `async with` cancels the answers that have not finished.
    """

    def __init__(self, engine: Engine, generations: Sequence[Generation], times: RequestTimes):
        self.generations = generations
        self.finished: dict[int, Finished] = {}
        self._engine, self._times = engine, times
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._lock = threading.Lock()
        self._news: dict[int, list[Delta | Finished]] = {}
        self._submitted = 0
        self._gone = False

    def submit(self) -> None:
        """Put all answers into the queue, or none. Raises ApiError if the engine refuses one of them."""
        try:
            for index, generation in enumerate(self.generations):
                self._engine.submit(generation, functools.partial(self._hear, index))
                self._submitted += 1
        except Refused as refused:
            self._cancel()
            raise from_refusal(refused) from None
        except ValueError as error:  # What only the engine knows, such as the most log probabilities.
            self._cancel()
            raise ApiError(str(error), code="invalid_value") from None

    async def __aenter__(self) -> Exchange:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._cancel()

    def _cancel(self) -> None:
        for index in range(self._submitted):
            if index not in self.finished:
                self._engine.cancel(self.generations[index].id)

    def disconnect(self) -> None:
        """Tell that the client is gone. `events` then raises Disconnected."""
        self._gone = True
        self._wake.set()

    async def events(self, deadline: float, silence: float) -> AsyncIterator[Event | None]:
        """Yield growth and ends of answers until all have finished; None after `silence` seconds without.

        Raises Disconnected; ApiError if an answer fails or the event loop's time passes `deadline`.
        """
        while len(self.finished) < len(self.generations):
            left = deadline - self._loop.time()
            if left <= 0:
                raise ApiError("the answer took longer than the server allows: ask for fewer tokens", status=504)
            try:
                async with asyncio.timeout(min(silence, left)):
                    await self._wake.wait()
            except TimeoutError:
                yield None
                continue
            self._wake.clear()
            if self._gone:
                raise Disconnected
            for event in self._take():
                index, news = event
                if isinstance(news, Finished):
                    self.finished[index] = news
                    _require_sound(news)
                yield event

    def _hear(self, index: int, news: Delta | Finished) -> None:
        """Listen to an answer, in the engine's thread."""
        self._times.hear(index, news, time.monotonic())
        with self._lock:
            waiting = self._news.setdefault(index, [])
            if waiting and isinstance(news, Delta) and isinstance(waiting[-1], Delta):
                waiting[-1] = _joined(waiting[-1], news)
            else:
                waiting.append(news)
        with contextlib.suppress(RuntimeError):  # The loop is closed: the server ends.
            self._loop.call_soon_threadsafe(self._wake.set)

    def _take(self) -> list[Event]:
        with self._lock:
            news, self._news = self._news, {}
        return [(index, each) for index, waiting in news.items() for each in waiting]


def _joined(first: Delta, second: Delta) -> Delta:
    return Delta(
        first.text + second.text,
        first.tokens + second.tokens,
        first.logprobs + second.logprobs,
        first.prompt_logprobs + second.prompt_logprobs,
    )


def _require_sound(end: Finished) -> None:
    """Raise ApiError if an answer ended without the client's doing."""
    if end.reason == "error":
        raise ApiError(end.message or "the answer failed: see the server's log", status=500, code="generation_failed")
    if end.reason == "cancelled":
        raise ApiError("the server ended the answer before it was complete", status=503, code="cancelled")
