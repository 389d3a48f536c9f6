"""`python -m razor_jax.launch [flags] -- script.py …` (or `-- -m module …`): one process of a run over many hosts.

Every host starts it once, with the same script and flags. It joins the processes by `jax.distributed.initialize`, runs
the script in a child process and watches it. JAX aborts all processes once one of them has died; here that is one line
on stderr (which process, why, the last prompt that was finished) and exit code 75, within the heartbeat's limit of the
death. 75 says: start again, as `--restarts` does. A code that the script chose itself (refused input, wrong usage) is
passed on, for another start would change nothing.

Who is who comes from the flags, else from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, else from a
LeaderWorkerSet (LWS_*) or an indexed Job (JOB_COMPLETION_INDEX); what is still open JAX detects by itself: Cloud TPU
VMs, TPUs on GKE, Slurm, Open MPI, and Jobs where the `kubernetes` package is installed.
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
HEARTBEAT = 20  # seconds; JAX's own 100 would leave the others waiting that long
GRACE = 10  # seconds that a worker has to end when asked

# From here on a worker's stderr is the death cry of JAX's coordination service, with a stack trace.
_FATAL = re.compile(rb"[EF]\d{4} .*(coordination_service|client\.h)")


def process_info(flags: argparse.Namespace, env: Mapping[str, str]) -> ProcessInfo:
    """Read the process's place from flags, then from the environment (names in the module's docstring).

    Raises ValueError that names a variable which is no number, or an id out of range.
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
    # The index of a Job says nothing where the rest is for JAX to detect.
    index = ("JOB_COMPLETION_INDEX",) if coordinator and processes else ()
    process = number(flags.process_id, "JAX_PROCESS_ID", "LWS_WORKER_INDEX", *index)
    return ProcessInfo(coordinator or None, processes, process, flags.connect_timeout, flags.heartbeat)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code of the last start."""
    flags = _parse(arguments)
    try:
        info = process_info(flags, os.environ)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    code = LOST
    with _Signals() as signals:
        for restart in range(flags.restarts + 1):
            code = _Worker(info, flags, signals).wait()
            if code != LOST or signals.asked or restart == flags.restarts:
                break
            # The other processes have to end first, or they would take the new one for the old.
            pause = info.heartbeat + 5
            print(f"razor-jax: start {restart + 2} of {flags.restarts + 1} in {pause} s", file=sys.stderr, flush=True)
            signals.wait(pause)
            if signals.asked:
                return signals.code
        if flags.stay and code != LOST:
            signals.wait()
    return code


class _Signals:
    """Those that ask for the end, from the first start to the last; the worker that runs is asked, too."""

    def __init__(self):
        self.asked: signal.Signals | None = None
        self._worker: subprocess.Popen | None = None

    def __enter__(self) -> _Signals:
        names = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self._before = {name: signal.signal(name, self._take) for name in names}
        return self

    def __exit__(self, *error: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    @property
    def code(self) -> int:
        """The exit code of one that was asked."""
        return 130 if self.asked == signal.SIGINT else LOST

    def reach(self, worker: subprocess.Popen) -> None:
        """Make this process the one that is asked to stop."""
        self._worker = worker
        if self.asked:
            self._end(worker)

    def wait(self, seconds: float = math.inf) -> None:
        """Wait for the time, or until asked to stop."""
        end = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end:
            time.sleep(0.2)  # a signal alone does not cut a sleep short

    def _take(self, number: int, frame: Any) -> None:
        self.asked = signal.Signals(number)
        if self._worker is not None:
            self._end(self._worker)

    def _end(self, worker: subprocess.Popen) -> None:
        worker.terminate()
        killer = threading.Timer(GRACE, worker.kill)
        killer.daemon = True
        killer.start()


class _Worker:
    """The child process of one start."""

    def __init__(self, info: ProcessInfo, flags: argparse.Namespace, signals: _Signals):
        self._info, self._debug, self._signals = info, flags.debug, signals
        self._notes: dict[str, Any] = {}
        self._withheld = b""
        ours, theirs = socket.socketpair()
        info_json = json.dumps(dataclasses.asdict(info))
        self._child = subprocess.Popen(
            [sys.executable, "-m", "razor_jax.launch.worker", str(theirs.fileno()), info_json, *flags.command],
            # With its preemption service JAX keeps SIGTERM to itself, and nothing would end.
            env={"JAX_ENABLE_PREEMPTION_SERVICE": "false", **os.environ},
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        signals.reach(self._child)
        assert self._child.stderr is not None
        self._listeners = [
            threading.Thread(target=listen, args=(source,), daemon=True)
            for listen, source in ((self._read_notes, ours.makefile("rb")), (self._forward_stderr, self._child.stderr))
        ]
        for listener in self._listeners:
            listener.start()

    def wait(self) -> int:
        """Return the launcher's exit code, when the child has ended; says why if it was not by itself."""
        code = self._child.wait()
        for listener in self._listeners:
            listener.join(timeout=2)
        if code == 0 or self._debug:
            sys.stderr.buffer.write(self._withheld)
            sys.stderr.flush()
        if code == 0:
            return 0
        print(f"razor-jax: {self._report_line(code)}", file=sys.stderr, flush=True)
        if self._signals.asked:
            return self._signals.code
        return code if 0 < code != LOST else LOST

    def _read_notes(self, notes: BinaryIO) -> None:
        for line in notes:
            with contextlib.suppress(ValueError):  # cut short by the worker's death
                self._notes |= json.loads(line)

    def _forward_stderr(self, stderr: BinaryIO) -> None:
        """Relay the child's stderr, without the text of JAX's abort."""
        for line in stderr:
            if self._withheld or _FATAL.match(line):
                self._withheld += line
            else:
                sys.stderr.buffer.write(line)
                sys.stderr.flush()

    def _report_line(self, code: int) -> str:
        process, processes = (self._notes.get(name, getattr(self._info, name)) for name in ("process", "processes"))
        who = f"process {'?' if process is None else process} of {processes or '?'} on {socket.gethostname()}"
        asked = self._signals.asked
        why = f"asked to by {asked.name}" if asked else ""
        why = why or explain(code, self._notes, self._withheld.decode(errors="replace"), self._info.connect_timeout)
        return f"{who} ended: {why}; last finished prompt: {self._notes.get('finished', 'none')}"


def explain(code: int, notes: Mapping[str, Any], last_words: str, connect_timeout: int) -> str:
    """Say why a worker ended: its own note, else JAX's last words in short, else its exit code."""
    if "error" in notes:
        return notes["error"]
    if last_words and notes.get("connecting"):
        return (
            f"{connect_timeout} s after its start not all processes had come together at {notes['connecting']} "
            "(coordinator not started or out of reach, or too few processes)"
        )
    silent = re.search(r"stopped sending heartbeats\):\s*([\d, \n]*\d)", last_words)
    if silent:
        return f"process {', '.join(silent[1].split())} is dead or out of reach"
    if "Failed to send RPC to coordination service" in last_words:
        return "process 0, the coordinator, is dead or out of reach"
    status = re.search(r"absl::Status: (.*)", last_words)
    if status:
        return status[1]
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m razor_jax.launch", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--coordinator", help=f"host:port of process 0; port {PORT} by default")
    parser.add_argument("--processes", type=int, help="how many processes there are")
    parser.add_argument("--process-id", type=int, help="which of them this is, from 0")
    parser.add_argument("--connect-timeout", type=int, default=300, help="seconds until all must have come")
    parser.add_argument("--heartbeat", type=int, default=HEARTBEAT, help="seconds after which a silent one is dead")
    parser.add_argument("--restarts", type=int, default=0, help="starts after the first, where a process was lost")
    parser.add_argument("--stay", action="store_true", help="after any end but a lost process wait for SIGTERM")
    parser.add_argument("--debug", action="store_true", help="JAX's own last words, too")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- script.py arguments, or -- -m module arguments")
    flags = parser.parse_args(arguments)
    if flags.command[:1] == ["--"]:
        flags.command = flags.command[1:]
    if not flags.command or flags.command == ["-m"]:
        parser.error("nothing to run: end with -- script.py … or -- -m module …")
    for name, least in (("processes", 1), ("process_id", 0), ("connect_timeout", 1), ("heartbeat", 2), ("restarts", 0)):
        if getattr(flags, name) is not None and getattr(flags, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(flags, name)}: at least {least}")
    return flags


if __name__ == "__main__":
    raise SystemExit(main())
