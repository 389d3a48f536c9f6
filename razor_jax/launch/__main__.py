"""`python -m razor_jax.launch [flags] -- script.py …` (or `-- -m module …`): one process of a multi-host run.

Start it once on every host, with the same script and flags. It runs the script in a child process that has joined the
others through `jax.distributed.initialize`, and watches it.

When one process dies, JAX aborts all of them. The launcher reports that in one line on stderr (which process, why, the
last finished prompt) and exits with code 75 within the heartbeat limit. 75 means "start again", which `--restarts`
does. An exit code that the script chose (refused input, wrong usage) is passed on: another start would not help.

Coordinator, number of processes and process id each come from the first of these that gives it:

1. the flags;
2. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
3. a LeaderWorkerSet (LWS_*) or an indexed Job (JOB_COMPLETION_INDEX);
4. JAX's detection: Cloud TPU VMs, TPUs on GKE, Slurm, Open MPI, and Jobs with the `kubernetes` package installed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from .worker import LOST, ProcessInfo

PORT = 8476
HEARTBEAT = 20  # seconds; with JAX's default of 100 the other processes would wait that long

# From this line on, a worker's stderr is only the abort message and stack trace of JAX's coordination service.
_FATAL = re.compile(rb"[EF]\d{4} .*(coordination_service|client\.h)")


def process_info(flags: argparse.Namespace, env: Mapping[str, str]) -> ProcessInfo:
    """Return the coordinator and process id from the flags and the environment variables named above.

    Raises ValueError for a variable that is not a whole number, or a process id out of range.
    """

    def number(flag: int | None, *names: str) -> int | None:
        for name in names if flag is None else ():
            if env.get(name):
                if not env[name].isdecimal():
                    raise ValueError(f"{name}={env[name]!r}: must be a whole number")
                return int(env[name])
        return flag

    coordinator = flags.coordinator or env.get("JAX_COORDINATOR_ADDRESS") or env.get("LWS_LEADER_ADDRESS")
    if coordinator and not re.search(r":\d+$", coordinator):
        coordinator = f"{coordinator}:{PORT}"
    processes = number(flags.processes, "JAX_NUM_PROCESSES", "LWS_GROUP_SIZE")
    # When JAX detects the coordinator, it also detects the process id: ignore the Job's index.
    index = ("JOB_COMPLETION_INDEX",) if coordinator and processes else ()
    process = number(flags.process_id, "JAX_PROCESS_ID", "LWS_WORKER_INDEX", *index)
    return ProcessInfo(coordinator or None, processes, process, flags.connect_timeout, flags.heartbeat)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, restart it after a lost process, and return the exit code of the last start."""
    flags = _parse(arguments)
    try:
        info = process_info(flags, os.environ)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    code = LOST
    with _Signals(flags.grace) as signals:
        for restart in range(flags.restarts + 1):
            code = _Worker(info, flags, signals).wait()
            if code != LOST or signals.received or restart == flags.restarts:
                break
            # The other processes must end first: they would mistake the new one for the old.
            pause = info.heartbeat + 5
            print(f"razor-jax: start {restart + 2} of {flags.restarts + 1} in {pause} s", file=sys.stderr, flush=True)
            signals.wait(pause)
            if signals.received:
                return signals.code
        if flags.stay and code != LOST:
            signals.wait()
    return code


class _Signals:
    """Handlers of SIGTERM, SIGINT and SIGHUP across all starts, which also stop the running worker.

    `grace`: seconds between SIGTERM and SIGKILL for the worker.
    """

    def __init__(self, grace: float):
        self._grace = grace
        self.received: signal.Signals | None = None
        self._worker: subprocess.Popen | None = None

    def __enter__(self) -> _Signals:
        names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._before = {name: signal.signal(name, self._on_signal) for name in names}
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    @property
    def code(self) -> int:
        """Exit code after such a signal."""
        return 130 if self.received == signal.SIGINT else LOST

    def attach(self, worker: subprocess.Popen) -> None:
        """Stop this worker when a signal arrives, or now if one has arrived."""
        self._worker = worker
        if self.received:
            self._terminate(worker)

    def wait(self, seconds: float = math.inf) -> None:
        """Wait for `seconds`, or until a signal arrives."""
        end = time.monotonic() + seconds
        while not self.received and time.monotonic() < end:
            time.sleep(0.2)  # sleep() resumes after a signal handler

    def _on_signal(self, number: int, frame: Any) -> None:
        self.received = signal.Signals(number)
        if self._worker is not None:
            self._terminate(self._worker)

    def _terminate(self, worker: subprocess.Popen) -> None:
        worker.terminate()
        killer = threading.Timer(self._grace, worker.kill)
        killer.daemon = True
        killer.start()


class _Worker:
    """Child process of one start."""

    def __init__(self, info: ProcessInfo, flags: argparse.Namespace, signals: _Signals):
        self._info, self._debug, self._signals = info, flags.debug, signals
        self._notes: dict[str, Any] = {}
        self._withheld = b""
        ours, theirs = socket.socketpair()
        info_json = json.dumps(dataclasses.asdict(info))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "razor_jax.launch.worker", str(theirs.fileno()), info_json, *flags.command],
            # JAX's preemption service would swallow SIGTERM, and the worker would never end.
            env={"JAX_ENABLE_PREEMPTION_SERVICE": "false", **os.environ},
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        signals.attach(self._child)
        assert self._child.stderr is not None
        self._listeners = [
            threading.Thread(target=listen, args=(source,), daemon=True)
            for listen, source in ((self._read_notes, ours.makefile("rb")), (self._forward_stderr, self._child.stderr))
        ]
        for listener in self._listeners:
            listener.start()

    def wait(self) -> int:
        """Wait for the child and return the launcher's exit code; report any end but success on stderr."""
        code = self._child.wait()
        for listener in self._listeners:
            listener.join(timeout=2)
        if code == 0 or self._debug:
            sys.stderr.buffer.write(self._withheld)
            sys.stderr.flush()
        if code == 0:
            return 0
        print(f"razor-jax: {self._report_line(code)}", file=sys.stderr, flush=True)
        if self._signals.received:
            return self._signals.code
        return code if 0 < code != LOST else LOST

    def _read_notes(self, notes: BinaryIO) -> None:
        for line in notes:
            with contextlib.suppress(ValueError):  # the worker died in the middle of a line
                self._notes |= json.loads(line)

    def _forward_stderr(self, stderr: BinaryIO) -> None:
        """Forward the child's stderr, except the text of JAX's abort."""
        for line in stderr:
            if self._withheld or _FATAL.match(line):
                self._withheld += line
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()

    def _report_line(self, code: int) -> str:
        process, processes = (self._notes.get(name, getattr(self._info, name)) for name in ("process", "processes"))
        who = f"process {'?' if process is None else process} of {processes or '?'} on {socket.gethostname()}"
        received = self._signals.received
        why = f"stopped by {received.name}" if received else ""
        why = why or explain(code, self._notes, self._withheld.decode(errors="replace"), self._info.connect_timeout)
        return f"{who} ended: {why}; last finished prompt: {self._notes.get('finished', 'none')}"


def explain(code: int, notes: Mapping[str, Any], last_words: str, connect_timeout: int) -> str:
    """Return why a worker ended: its own note, a summary of JAX's abort message, or its exit code."""
    if "error" in notes:
        return notes["error"]
    if last_words and notes.get("connecting"):
        return (
            f"not all processes connected to {notes['connecting']} within {connect_timeout} s "
            "(coordinator not started or unreachable, or too few processes)"
        )
    silent = re.search(r"stopped sending heartbeats\):\s*([\d, \n]*\d)", last_words)
    if silent:
        return f"process {', '.join(silent[1].split())} is dead or unreachable"
    if "Failed to send RPC to coordination service" in last_words:
        return "process 0, the coordinator, is dead or unreachable"
    status = re.search(r"absl::Status: (.*)", last_words)
    if status:
        return status[1]
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m razor_jax.launch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--coordinator", help=f"host:port of process 0; port {PORT} by default")
    parser.add_argument("--processes", type=int, help="number of processes")
    parser.add_argument("--process-id", type=int, help="id of this process, from 0")
    parser.add_argument(
        "--connect-timeout", type=int, default=300, help="seconds within which all processes must connect"
    )
    parser.add_argument(
        "--heartbeat", type=int, default=HEARTBEAT, help="seconds of silence after which a process counts as dead"
    )
    parser.add_argument(
        "--grace", type=int, default=10, help="seconds between SIGTERM and SIGKILL for a worker that does not end"
    )
    parser.add_argument("--restarts", type=int, default=0, help="restarts after a lost process")
    parser.add_argument("--stay", action="store_true", help="wait for SIGTERM after any end except a lost process")
    parser.add_argument("--debug", action="store_true", help="also print JAX's abort message")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- script.py arguments, or -- -m module arguments")
    flags = parser.parse_args(arguments)
    if flags.command[:1] == ["--"]:
        flags.command = flags.command[1:]
    if not flags.command or flags.command == ["-m"]:
        parser.error("nothing to run: end with -- script.py … or -- -m module …")
    least_values = {"processes": 1, "process_id": 0, "connect_timeout": 1, "heartbeat": 2, "grace": 0, "restarts": 0}
    for name, least in least_values.items():
        if getattr(flags, name) is not None and getattr(flags, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(flags, name)}: must be at least {least}")
    return flags


if __name__ == "__main__":
    raise SystemExit(main())
