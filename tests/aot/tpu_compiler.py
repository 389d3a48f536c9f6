"""The real TPU compiler in a process of its own: libtpu reads its environment once, before JAX starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def run(script: str, argument: Any, timeout: int = 900) -> list[Any]:
    """What `script` prints as JSON, a line each; it finds `argument` as JSON in sys.argv[1]."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment.pop("XLA_FLAGS", None)  # the suite's own is for the CPU
    command = [sys.executable, "-c", script, json.dumps(argument)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(("{", "["))]
