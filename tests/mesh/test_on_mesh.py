"""Everything on meshes, in a process that has 8 virtual devices.

XLA_FLAGS="--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8" pytest -n 0 tests/sharded
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.xla_flags import FLAGS


def run(record_property, *arguments: str) -> None:
    # One process, in which files share what they have compiled; this one may be one of two already.
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/sharded", *arguments]
    environment = os.environ | {
        "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 0
    # What the tests recorded is printed at their end, and belongs to this run.
    for name, value in re.findall(r"^(.+): (\d\.\de[+-]\d\d)$", done.stdout, re.MULTILINE):
        record_property(name, float(value))


def test_on_eight_devices(record_property):
    run(record_property, "-m", "not slow")


@pytest.mark.slow
def test_on_eight_devices_at_length(record_property):
    run(record_property, "-m", "slow")
