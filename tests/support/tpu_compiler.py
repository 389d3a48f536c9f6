"""The real TPU compiler in its own process, because libtpu reads its environment once, before JAX starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# Generation, and which share of a file's cases it compiles: all on v5e, every third elsewhere, all with `-m slow`.
_OTHERS = ("v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
GENERATIONS = [
    ("v5e:2x2", 1),
    *((topology, 3) for topology in _OTHERS),
    *(pytest.param(topology, 1, marks=pytest.mark.slow) for topology in _OTHERS),
]

# Llama-3-8B, as arguments of ModelConfig.
LLAMA = {"args": ["llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072]}

# Counts copies of an array as large as a cache, also those in fast memory, which `memory_analysis` does not count.
COPIES = """
import re

def copies(compiled, leaves):
    try:
        text = compiled.as_text()
    except Exception as error:  # 7x: "async-update instruction should have 1 operands"
        return str(error)
    caches = [x for x in leaves if x.ndim == 4 and x.size > 1 << 19]
    sizes, slots = {x.size for x in caches}, {x.shape[2] for x in caches}
    found = re.findall(r"= \\(?\\w+\\[([\\d,]+)\\][^=]* (?:copy|copy-start|transpose)\\(.*", text)
    shapes = [[int(n) for n in shape.split(",")] for shape in found]
    return [shape for shape in shapes if np.prod(shape) in sizes and slots & set(shape)]
"""


def run(script: str, argument: Any, timeout: int = 900) -> list[Any]:
    """Return the JSON lines that `script` prints, given `argument` as JSON in sys.argv[1]."""
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
