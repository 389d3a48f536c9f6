"""An engine that plays answers from a script on a thread of its own, in place of a model."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from razor_jax import Assets
from razor_jax.server.generation import (
    Delta,
    EngineStats,
    Finished,
    Generation,
    Listener,
    Refused,
)
from razor_jax.text.logprobs import TokenLogprob
from razor_jax.text.row_output import RowOutput


@dataclasses.dataclass
class _Live:
    generation: Generation
    listener: Listener
    answer: list[int]
    output: RowOutput
    prefill: int
    given: int = 0
    cancelled: bool = False


class ScriptedEngine:
    """Gives each running answer one token per tick.

    Attributes:
      script: token ids, or text, of an answer. Longer answers are cut at max_tokens.
      tick_seconds: time of a tick.
      prefill_ticks: ticks before the first token.
      fails: whether an answer fails, after its second token.
      failure: why it ended by itself; a test may set it.
      gate: ticks run while it is set.
      seen: generations in the order of their arrival.
      cancels: ids that were cancelled while they lived, with the number of ticks that this took.
    """

    def __init__(self, assets: Assets, slots: int = 8, capacity: int = 4096, max_waiting: int = 1024):
        self.script: Callable[[Generation], Sequence[int] | str] = lambda generation: "a scripted answer"
        self.tick_seconds = 0.001
        self.prefill_ticks = 1
        self.fails: Callable[[Generation], bool] = lambda generation: False
        self.gate = threading.Event()
        self.gate.set()
        self.seen: list[Generation] = []
        self.cancels: dict[str, int] = {}
        self._assets, self._slots, self._capacity, self._max_waiting = assets, slots, capacity, max_waiting
        self._lock = threading.Lock()
        self._live: dict[str, _Live] = {}
        self._ended: collections.Counter[str] = collections.Counter()
        self._tokens: collections.Counter[str] = collections.Counter()
        self._ticks, self._last = 0, time.monotonic()
        self.failure: Exception | None = None
        self._started, self._draining, self._over = False, False, False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._started = True

    @property
    def ready(self) -> bool:
        return self._started and not self._draining

    def submit(self, generation: Generation, listener: Listener) -> None:
        with self._lock:
            tokens = len(generation.prompt) + generation.max_tokens
            if self._draining:
                raise Refused("draining", "the server shuts down")
            if tokens > self._capacity:
                raise Refused("too_large", f"{tokens} tokens, but a request may have {self._capacity}")
            if generation.id in self._live:
                raise Refused("duplicate", f"request id {generation.id!r} is in use")
            if len(self._live) >= self._slots + self._max_waiting:
                raise Refused("queue_full", f"{self._max_waiting} requests wait, the most allowed: try again later")
            script = self.script(generation)
            answer = self._assets.encode(script, add_special=False) if isinstance(script, str) else list(script)
            if isinstance(script, str):
                answer.append(self._assets.eos_ids[0])
            output = RowOutput(self._assets, generation.stop, generation.max_tokens)
            self._live[generation.id] = _Live(generation, listener, answer, output, self.prefill_ticks)
            self._tokens["prompt"] += len(generation.prompt)
            self.seen.append(generation)

    def cancel(self, id: str) -> None:
        with self._lock:
            if id in self._live:
                self._live[id].cancelled = True
                self.cancels[id] = self._ticks

    def stats(self) -> EngineStats:
        live = len(self._live)
        running = min(live, self._slots)
        return EngineStats(
            running=running,
            waiting=live - running,
            slots=self._slots,
            pages_used=(running,),
            pages=(self._slots,),
            cache_bytes=1000 * self._slots,
            used_bytes=400 * running,
            dense_bytes=1000 * running,
            prompt_tokens=self._tokens["prompt"],
            completion_tokens=self._tokens["completion"],
            cached_tokens=0,
            finished=dict(self._ended),
            compilations=0,
            ticks=self._ticks,
            last_tick_age=time.monotonic() - self._last,
            dropped_tokens=7 * running,
        )

    def drain(self, seconds: float) -> bool:
        self._draining = True
        deadline = time.monotonic() + seconds
        while self._live and time.monotonic() < deadline:
            time.sleep(0.005)
        in_time = not self._live
        for id in list(self._live):
            self.cancel(id)
        self._over = True
        self._thread.join()
        return in_time

    def _run(self) -> None:
        while not (self._over and not self._live):
            time.sleep(self.tick_seconds)
            if self.gate.is_set() or self._over:
                self._tick()

    def _tick(self) -> None:
        with self._lock:
            running = list(self._live.values())[: self._slots]
            cancelled = [live for live in self._live.values() if live.cancelled]
        self._ticks, self._last = self._ticks + 1, time.monotonic()
        for live in cancelled:
            self.cancels[live.generation.id] = self._ticks - self.cancels[live.generation.id]
            self._finish(live, "cancelled")
        for live in running:
            if not live.cancelled:
                self._step(live)

    def _step(self, live: _Live) -> None:
        if live.prefill:
            live.prefill -= 1
            return
        if self.fails(live.generation) and live.given == 2:
            self._finish(live, "error", "a fault in this row")
            return
        token = live.answer[live.given] if live.given < len(live.answer) else self._assets.eos_ids[0]
        grammar = live.generation.grammar
        if grammar is not None:
            allowed = grammar.mask()
            token = token if allowed[token] else int(np.flatnonzero(allowed)[0])
            grammar.accept(token)
        live.given += 1
        self._tokens["completion"] += 1
        live.output.push([token])
        text = live.output.take()
        wanted = live.generation.logprobs
        logprobs = () if wanted is None else (_logprob(token, wanted),)
        of_prompt = ()
        if live.generation.prompt_logprobs and live.given == 1:
            of_prompt = tuple(_logprob(each, wanted or 0) for each in live.generation.prompt[1:])
        live.listener(Delta(text, (token,), logprobs, of_prompt))
        if live.output.finished:
            self._finish(live, live.output.finish_reason)

    def _finish(self, live: _Live, reason: Any, message: str = "") -> None:
        with self._lock:
            self._live.pop(live.generation.id, None)
        self._ended[reason] += 1
        live.listener(Finished(reason, len(live.generation.prompt), live.given, 0, message))


def _logprob(token: int, top: int) -> TokenLogprob:
    """A made-up log probability; the second likeliest token cannot come at all."""
    return TokenLogprob(token, -0.25, tuple((token + i, -0.25 if i == 0 else -np.inf) for i in range(top)))
