"""Prompts typed on process 0, answered by all."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any

import jax

from .messages import shared

TICK = 5.0  # seconds: the others wait in a collective for process 0, which must not take for ever


def serve(answer: Callable[[str], None], lines: Iterable[str], tick: float = TICK) -> None:
    """Call `answer` on every process with each line that process 0 reads, up to the end or `/exit`."""
    inbox: queue.Queue[str | None] = queue.Queue()
    if jax.process_index() == 0:
        threading.Thread(target=_read, args=(lines, inbox), daemon=True).start()
    while (said := shared(lambda: _next(inbox, tick))) != {"line": "/exit"}:
        if said.get("line"):
            answer(said["line"])


def _read(lines: Iterable[str], inbox: queue.Queue[str | None]) -> None:
    for line in lines:
        inbox.put(line.strip())
    inbox.put("/exit")


def _next(inbox: queue.Queue[Any], tick: float) -> dict[str, str]:
    """The next line; nothing where none came in time."""
    try:
        return {"line": inbox.get(timeout=tick)}
    except queue.Empty:
        return {}
