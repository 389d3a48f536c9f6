"""The child process that `razor_jax.launch` watches: it joins the run, runs the script and leaves.

One socket ties the two together. Notes for the launcher go out by it; when it closes, the launcher is dead, and the
worker does not outlive it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import runpy
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

import jax

LOST = 75  # EX_TEMPFAIL: a process was lost, start again
TOLD_SECONDS = 3  # for the others to hear from a process that ends by itself why it does

# JAX's word for what another start would meet again: too little memory, a program that is wrong.
_VERDICTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")

_launcher: socket.socket | None = None


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Where a process stands in its run; None is for JAX to detect.

    Attributes:
      coordinator: host:port of process 0.
      processes, process: how many there are, and which this is.
      connect_timeout: seconds until all must have come.
      heartbeat: seconds after which a silent process counts as dead.
    """

    coordinator: str | None
    processes: int | None
    process: int | None
    connect_timeout: int
    heartbeat: int

    def __post_init__(self):
        if self.processes is not None and self.process is not None and not 0 <= self.process < self.processes:
            raise ValueError(f"process {self.process} of {self.processes}: ids go from 0 to {self.processes - 1}")


def notify_launcher(**notes: Any) -> None:
    """Notes for the line that the launcher prints if this process ends abnormally: `finished` a prompt's id, `error`
    what went wrong. Nothing happens without a launcher."""
    if _launcher is not None:
        _launcher.sendall(json.dumps(notes).encode() + b"\n")


def code_of(error: Exception) -> int:
    """Return the exit code for a JaxRuntimeError; the launcher is told its first line.

    Mostly it is of a collective whose other end is gone, hence LOST; 1 for what another start would meet again.
    """
    first = str(error).partition("\n")[0]
    notify_launcher(error=first)
    return 1 if first.startswith(_VERDICTS) else LOST


def main(arguments: Sequence[str]) -> int:
    """Run the command; `arguments` are the socket's number, the place as JSON, and the command."""
    global _launcher
    _launcher = socket.socket(fileno=int(arguments[0]))
    _launcher.set_inheritable(False)
    threading.Thread(target=_end_with, args=(_launcher,), daemon=True).start()
    code = _run(ProcessInfo(**json.loads(arguments[1])), arguments[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    if code != LOST:
        leave = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leave.start()
        leave.join(timeout=None if code == 0 else TOLD_SECONDS)
        if not leave.is_alive():
            return code
    # Python's own way out waits for processes that are gone.
    os._exit(code)


def _run(info: ProcessInfo, command: Sequence[str]) -> int:
    """Return the exit code: the script's own, or LOST where it came to no end of its own."""
    try:
        if info.processes != 1:
            _keep_stdout()
            _connect(info)
        if command[0] == "-m":
            sys.argv = list(command[1:])
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(command)
            sys.path[0] = os.path.dirname(os.path.abspath(command[0]))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except jax.errors.JaxRuntimeError as error:
        return code_of(error)
    except BaseException as error:
        traceback.print_exc()
        notify_launcher(error=f"{type(error).__name__}: {error}".partition("\n")[0])
        return LOST
    return 0


def _keep_stdout() -> None:
    """Keep stdout for Python: what libraries below it write there (gloo: who is connected) goes to stderr."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


def _connect(info: ProcessInfo) -> None:
    explicit = None not in (info.coordinator, info.processes, info.process)
    # Where nobody answers JAX aborts, and an address that it detected stands in its log only.
    logger, note = logging.getLogger("jax._src.distributed"), _Address()
    level, logger.propagate = logger.level, False
    logger.addHandler(note)
    logger.setLevel(logging.INFO)
    try:
        notify_launcher(connecting=info.coordinator or "the address that JAX detects")
        jax.distributed.initialize(
            info.coordinator,
            info.processes,
            info.process,
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=info.connect_timeout,
            heartbeat_timeout_seconds=info.heartbeat,
        )
    except (ValueError, TypeError) as error:
        raise SystemExit(
            f"error: {error} Give --coordinator HOST:PORT, --processes N and --process-id I, or start under Slurm, on "
            "Cloud TPU VMs, in a LeaderWorkerSet or in an indexed Job (docs/distributed.md)"
        ) from error
    finally:
        logger.removeHandler(note)
        logger.setLevel(level)
        logger.propagate = True
    notify_launcher(connecting=None)


class _Address(logging.Handler):
    """Tells the launcher which address JAX connects to."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Connecting") and isinstance(record.args, tuple):
            notify_launcher(connecting=str(record.args[0]))


def _end_with(launcher: socket.socket) -> None:
    launcher.recv(1)
    os._exit(LOST)


if __name__ == "__main__":
    # As the module that scripts import, not a second copy of it.
    from razor_jax.launch import worker

    raise SystemExit(worker.main(sys.argv[1:]))
