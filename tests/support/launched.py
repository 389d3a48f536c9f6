"""Several processes on this machine that run as one, each under a launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "serve_multihost.py"


class Run:
    """A run on this machine, with one launcher per process.

    `devices`: of each process. `flags`: of the launchers.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        each=((), ()),
        typed: str = "",
        script: Path = SCRIPT,
        devices: int = 4,
        flags: tuple[str, ...] = (),
    ):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        self.folder, self._devices = folder, devices
        launch = [sys.executable, "-m", "razor_jax.launch", "--coordinator", coordinator, "--heartbeat", "8", *flags]
        launch += ["--processes", str(len(each))]
        (folder / "typed").write_text(typed)
        self.launchers = [
            self._start(index, [*launch, "--process-id", str(index), "--", str(script), *arguments, *own])
            for index, own in enumerate(each)
        ]

    def _start(self, index: int, command: list[str]) -> subprocess.Popen:
        out, err = (self.folder / f"{name}_{index}" for name in ("stdout", "stderr"))
        env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(self._devices), "PYTHONPATH": str(ROOT)}
        with (self.folder / "typed").open() as typed, out.open("w") as to, err.open("w") as errors:
            return subprocess.Popen(command, env=env, stdin=typed, stdout=to, stderr=errors)

    def kill_worker(self, index: int) -> None:
        launcher = self.launchers[index].pid
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

    def wait(self, limit: float) -> list[int]:
        """Return the exit codes; kill what still runs after `limit` seconds and fail the test."""
        end = time.monotonic() + limit
        try:
            return [launcher.wait(max(0.1, end - time.monotonic())) for launcher in self.launchers]
        except subprocess.TimeoutExpired:
            for launcher in self.launchers:
                launcher.terminate()
            raise AssertionError("\n".join(self.said(index) for index in range(len(self.launchers)))) from None

    def said(self, index: int) -> str:
        return (self.folder / f"stderr_{index}").read_text()

    def answered(self, index: int) -> str:
        return (self.folder / f"stdout_{index}").read_text()
