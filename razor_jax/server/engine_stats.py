"""The statistics of the engine: counters since its start, and a snapshot of what its cache has."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterable, Sequence

from . import pages, scheduler
from .engine_answer import Answer
from .generation import EngineStats
from .pages import Layout


@dataclasses.dataclass
class Counters:
    """Totals since the start of an engine.

    Attributes:
      finished: answers by reason. tokens: "prompt", "completion" and "cached".
      last_tick: when a tick ended last, in the time of `time.monotonic`.
    """

    finished: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    tokens: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    ticks: int = 0
    last_tick: float = dataclasses.field(default_factory=time.monotonic)
    compilations: int = 0


def snapshot(layout: Layout, state: scheduler.State, answers: Iterable[Answer], counters: Counters) -> EngineStats:
    """Return the statistics now."""
    used = dense = dropped = 0
    for answer in answers:
        if answer.running is not None:
            bytes_used, bytes_dense, tokens_dropped = _row(layout, answer)
            used, dense, dropped = used + bytes_used, dense + bytes_dense, dropped + tokens_dropped
    return EngineStats(
        running=len(state.running),
        waiting=len(state.waiting),
        slots=layout.slots,
        pages_used=tuple(count - len(free) for count, free in zip(layout.pages, state.free_pages, strict=True)),
        pages=layout.pages,
        cache_bytes=layout.cache_bytes,
        used_bytes=used,
        dense_bytes=dense,
        prompt_tokens=counters.tokens["prompt"],
        completion_tokens=counters.tokens["completion"],
        cached_tokens=counters.tokens["cached"],
        finished=dict(counters.finished),
        compilations=counters.compilations,
        ticks=counters.ticks,
        last_tick_age=time.monotonic() - counters.last_tick,
        dropped_tokens=dropped,
    )


def _row(layout: Layout, answer: Answer) -> tuple[int, int, int]:
    """Return the bytes of a row's tokens, the bytes if every head kept them, and the tokens dropped."""
    spec = layout.spec
    n = answer.held + max(0, answer.count - 1)
    kept = min(n, spec.sinks + answer.window) if spec.razor is not None else n
    used = sum((kept if windowed else n) * pages.token_bytes(spec, windowed) for windowed in layout.kinds)
    used += pages.compensation_bytes(spec) if n > kept else 0
    return used, n * pages.dense_token_bytes(spec), n - kept


__all__: Sequence[str] = ("Counters", "snapshot")
