"""Prompts typed on process 0 and answered by all processes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

import jax

from .messages import broadcast_from_process_0

TICK = 5.0  # seconds between broadcasts of an idle process 0; the others wait in a collective, which can time out


def serve(answer: Callable[[str], None], lines: Iterable[str], tick: float = TICK) -> None:
    """Call `answer` on every process with each line that process 0 reads, until the input ends or `/exit`.

    Raises ValueError, on every process, if a line cannot be read.
    """
    inbox: queue.Queue[str | ValueError] = queue.Queue()
    if jax.process_index() == 0:
        threading.Thread(target=_read, args=(lines, inbox), daemon=True).start()
    while (message := broadcast_from_process_0(lambda: _next(inbox, tick))) != {"line": "/exit"}:
        if message.get("line"):
            answer(message["line"])


def _read(lines: Iterable[str], inbox: queue.Queue[str | ValueError]) -> None:
    try:
        for line in lines:
            inbox.put(line.strip())
        inbox.put("/exit")
    except Exception as error:  # `_next` raises it: an exception in this thread would go unseen
        inbox.put(ValueError(f"a prompt cannot be read ({error}): give lines of UTF-8 text"))


def _next(inbox: queue.Queue[str | ValueError], tick: float) -> dict[str, str]:
    """Return the next line, {} if none came within `tick` seconds."""
    try:
        line = inbox.get(timeout=tick)
    except queue.Empty:
        return {}
    if isinstance(line, ValueError):
        raise line
    return {"line": line}
