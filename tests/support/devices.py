"""Test functions in processes of their own: JAX counts its devices once, when it starts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_CHILD = """
import importlib, tests.conftest, jax
{start}
assert jax.local_device_count() == {devices}
getattr(importlib.import_module({module!r}), {name!r})(*{arguments!r})
print("done")
"""


def run(test: Callable[..., None], *arguments: Any, devices: int = 8, processes: int = 1, timeout: float = 600) -> None:
    """Call a module's function `test` with plain arguments in `processes` processes of `devices` CPU devices each,
    under JAX's distributed runtime where there are several; what it raises fails here."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    running = []
    for index in range(processes):
        start = f"jax.distributed.initialize({address!r}, {processes}, {index})" if processes > 1 else ""
        code = _CHILD.format(
            start=start, devices=devices, module=test.__module__, name=test.__name__, arguments=arguments
        )
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=environment,
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        outputs = [process.communicate(timeout=timeout) for process in running]
    finally:
        for process in running:
            process.kill()
    for out, err in outputs:
        assert out.strip().endswith("done"), err[-4000:]
