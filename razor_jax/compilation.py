"""Compilation: a persistent cache of programs, counts and times, and log messages."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax

log = logging.getLogger("razor_jax")

_COMPILE = "/jax/core/compile/backend_compile_duration"
_EVENTS = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration", _COMPILE)
_totals = {"programs": 0, "seconds": 0.0}


def user_cache() -> Path:
    """Return the user's cache folder of this package (under $XDG_CACHE_HOME or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "razor_jax"


def totals() -> tuple[int, float]:
    """Return the number of programs compiled since `track_compilation`, and the seconds spent.

    Programs read from the persistent cache count too. Seconds include tracing and lowering.
    """
    track_compilation()
    return _totals["programs"], _totals["seconds"]


@functools.cache
def track_compilation() -> None:
    """Start counting compilations, and enable the persistent cache unless the user has configured one."""
    counted: list[tuple[float, float]] = []  # End time and duration of each event.

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        if event not in _EVENTS:
            return
        _totals["programs"] += event == _COMPILE
        now = time.perf_counter()
        inside = 0.0  # Nested events report before the event that contains them.
        while counted and counted[-1][0] > now - duration_secs:
            inside += counted.pop()[1]
        counted.append((now, max(duration_secs, inside)))
        _totals["seconds"] += max(0.0, duration_secs - inside)

    jax.monitoring.register_event_duration_secs_listener(count)
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = user_cache() / "xla"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("compiled programs cannot be stored, so each start compiles again: %s", error)
            return
        jax.config.update("jax_compilation_cache_dir", str(folder))
        # Programs that compile faster than JAX's default of a second are most of those of a short answer.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)


def make_room() -> None:
    """Forget compiled programs if the process holds more than half of the memory mappings that Linux allows it.

    Each program takes several. At the limit XLA fails with "Cannot allocate memory", however much is free.
    """
    try:
        most, held = Path("/proc/sys/vm/max_map_count").read_text(), Path("/proc/self/maps").read_text()
    except OSError:
        return
    if held.count("\n") > int(most) // 2:
        log.debug("forgetting compiled programs: %d memory mappings of %s", held.count("\n"), most.strip())
        jax.clear_caches()


@contextlib.contextmanager
def log_compilation(what: str) -> Iterator[None]:
    """Log the compilation time of the body if it exceeds half a second."""
    programs, seconds = totals()
    started = time.perf_counter()
    log.debug("%s …", what)
    yield
    more, spent = totals()[0] - programs, totals()[1] - seconds
    if more and spent > 0.5:
        log.info("compiling %s: %.1f s of %.1f s", what, spent, time.perf_counter() - started)
