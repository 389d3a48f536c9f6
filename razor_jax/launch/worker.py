"""The child process that `razor_jax.launch` watches: it joins the run, runs the script and leaves.

A socket connects it to the launcher and carries its notes. When the socket closes, the launcher has died and the worker
exits.
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
LEAVE_SECONDS = 3  # to sign off from the coordinator, so that the others learn that this process ended by itself

# Status codes of JAX errors that a restart would meet again: too little memory, a wrong program.
_PERMANENT_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")

_launcher: socket.socket | None = None


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """How a process joins its run; JAX detects what is None.

    Attributes:
      coordinator: host:port of process 0.
      processes, process: the number of processes, and the id of this one.
      connect_timeout: seconds within which all processes must connect.
      heartbeat: seconds of silence after which a process counts as dead.
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
    """Send notes for the line that the launcher prints if this process ends abnormally.

    `finished` is the id of the last finished prompt, `error` says what went wrong. Does nothing without a launcher.
    """
    if _launcher is not None:
        _launcher.sendall(json.dumps(notes).encode() + b"\n")


def exit_code(error: Exception) -> int:
    """Send the first line of a JaxRuntimeError to the launcher and return the exit code.

    The code is 1 for an error that a restart would meet again, otherwise LOST: most are collectives whose peer died.
    """
    first = str(error).partition("\n")[0]
    notify_launcher(error=first)
    return 1 if first.startswith(_PERMANENT_ERRORS) else LOST


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code.

    `arguments` are the socket's file descriptor, a ProcessInfo as JSON, and the command.
    """
    global _launcher
    _launcher = socket.socket(fileno=int(arguments[0]))
    _launcher.set_inheritable(False)
    threading.Thread(target=_exit_with_launcher, args=(_launcher,), daemon=True).start()
    code = _run(ProcessInfo(**json.loads(arguments[1])), arguments[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    if code != LOST:
        leave = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leave.start()
        leave.join(timeout=None if code == 0 else LEAVE_SECONDS)
        if not leave.is_alive():
            return code
    # A normal exit would wait for processes that are gone.
    os._exit(code)


def _run(info: ProcessInfo, command: Sequence[str]) -> int:
    """Run the script and return its exit code, or LOST if an exception ended it."""
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
        return exit_code(error)
    except BaseException as error:
        traceback.print_exc()
        notify_launcher(error=f"{type(error).__name__}: {error}".partition("\n")[0])
        return LOST
    return 0


def _keep_stdout() -> None:
    """Keep stdout for Python; send what native libraries print there (gloo's connection log) to stderr."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    os.dup2(2, 1)


def _connect(info: ProcessInfo) -> None:
    explicit = None not in (info.coordinator, info.processes, info.process)
    # If nobody answers, JAX aborts, and only its log has the address that it detected.
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
    """Log handler that sends the launcher the address that JAX connects to."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Connecting") and isinstance(record.args, tuple):
            notify_launcher(connecting=str(record.args[0]))


def _exit_with_launcher(launcher: socket.socket) -> None:
    launcher.recv(1)
    os._exit(LOST)


if __name__ == "__main__":
    # Run the module that scripts import, not a second copy named __main__.
    from razor_jax.launch import worker

    raise SystemExit(worker.main(sys.argv[1:]))
