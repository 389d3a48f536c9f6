"""Prompts typed on process 0, answered by all."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

import jax

from .messages import broadcast_from_process_0

TICK = 5.0  # seconds: the others wait in a collective for process 0, which must not take for ever


def serve(answer: Callable[[str], None], lines: Iterable[str], tick: float = TICK) -> None:
    """Call `answer` on every process with each line that process 0 reads, up to the end or `/exit`.

    Raises ValueError, on every process, where a line cannot be read.
    """
    inbox: queue.Queue[str | ValueError] = queue.Queue()
    if jax.process_index() == 0:
        threading.Thread(target=_read, args=(lines, inbox), daemon=True).start()
    while (said := broadcast_from_process_0(lambda: _next(inbox, tick))) != {"line": "/exit"}:
        if said.get("line"):
            answer(said["line"])


def _read(lines: Iterable[str], inbox: queue.Queue[str | ValueError]) -> None:
    try:
        for line in lines:
            inbox.put(line.strip())
        inbox.put("/exit")
    except Exception as error:  # nobody sees a thread die: whoever waits for lines has to raise it
        inbox.put(ValueError(f"a prompt cannot be read ({error}): give lines of text, in UTF-8"))


def _next(inbox: queue.Queue[str | ValueError], tick: float) -> dict[str, str]:
    """Return the next line; nothing where none came in time."""
    try:
        line = inbox.get(timeout=tick)
    except queue.Empty:
        return {}
    if isinstance(line, ValueError):
        raise line
    return {"line": line}
