"""The process that renders chat templates, started at the first one and ended when a template exceeds a limit."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Limits of one call: a constant, and more per byte of the input. A real template takes milliseconds.
SECONDS, SECONDS_PER_INPUT = 10, 1e-6
MEMORY, MEMORY_PER_INPUT = 2**29, 64  # Bytes of the whole process.
CHARACTERS, CHARACTERS_PER_INPUT = 1_000_000, 10  # Length of the text.
_START_SECONDS = 60
_PROGRAM = Path(__file__).with_name("template_worker.py")


class Stopped(Exception):
    """A template exceeded a limit; the message says which one."""


class TemplateProcess:
    """A worker process that one thread at a time uses."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._inherited: subprocess.Popen[bytes] | None = None  # The parent's, in a forked process.
        atexit.register(self.end)
        if hasattr(os, "register_at_fork"):  # Absent on Windows.
            os.register_at_fork(after_in_child=self._forget)

    def render(self, template: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return {"text": …}, or {"error": kind, "line": …, "message": …} if the template is broken or refuses.

        Raises `Stopped` if the template exceeds a limit, and TypeError or ValueError if `variables` are not plain JSON
        data. The limits grow with the input.
        """
        data = json.dumps(variables)
        size = len(data) + len(template)
        memory = MEMORY + MEMORY_PER_INPUT * size
        characters = CHARACTERS + CHARACTERS_PER_INPUT * size
        seconds = SECONDS + int(SECONDS_PER_INPUT * size)
        call = json.dumps({"template": template, "memory": memory, "characters": characters, "seconds": seconds})
        with self._lock:
            process = self._started()
            # The variables may be megabytes: they are written as they were measured.
            answer = self._ask(process, f'{{"call": {call}, "variables": {data}}}\n'.encode(), seconds)
            if answer.get("error") == "memory":
                self.end()  # What is left of its memory is unknown.
        match answer.get("error"):
            case "memory":
                raise Stopped(f"needs more than {memory / 2**20:,.0f} MiB of memory")
            case "length":
                raise Stopped(f"writes more than {characters:,} characters")
        return answer

    def end(self) -> None:
        """End the process; the next template starts another."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with contextlib.suppress(OSError):  # A request that it has not read.
                process.__exit__(None, None, None)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.end()
        if self._process is None:
            paths = json.dumps([os.path.abspath(path) for path in sys.path if path])
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_PROGRAM), paths],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._ask(self._process, b"", _START_SECONDS)
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], request: bytes, seconds: float) -> dict[str, Any]:
        """Write a request and return the answer. End the process if that fails or is interrupted."""
        assert process.stdin is not None
        assert process.stdout is not None
        line = b""
        try:
            with _deadline(process, seconds) as over, contextlib.suppress(BrokenPipeError):
                process.stdin.write(request)
                process.stdin.flush()
                line = process.stdout.readline()
        finally:
            if not line.endswith(b"\n"):
                self.end()
        if over.is_set():
            raise Stopped(f"runs longer than {seconds} seconds")
        if not line:
            raise Stopped(f"ended the process that renders it (exit code {process.returncode})")
        return json.loads(line)

    def _forget(self) -> None:
        """Leave the process to the parent of a fork: two processes must not share its pipes."""
        self._lock = threading.Lock()
        self._inherited, self._process = self._process, None


@contextlib.contextmanager
def _deadline(process: subprocess.Popen[bytes], seconds: float) -> Iterator[threading.Event]:
    """Kill the process after `seconds`, from any thread; the event is set if that happened."""
    over = threading.Event()

    def kill() -> None:
        over.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield over
    finally:
        timer.cancel()


PROCESS = TemplateProcess()
