"""The planner's arithmetic against the TPU compiler.

    pip install -e '.[aot]'
    pytest -n 0 tests/aot/test_planner.py

Each program compiles in its own process, and the larger ones take minutes.
"""

from __future__ import annotations

import dataclasses

import pytest

from razor_jax import RazorConfig, planner
from razor_jax.planner import Job, compiler

from ..support import tpu_compiler

pytest.importorskip("libtpu", reason="the TPU compiler is in the extra 'aot': pip install -e '.[aot]'")

RAZOR = RazorConfig(kv_dtype="int8")


def job(topology: str, layers: int, **changes) -> Job:
    """By default: the first layers of Llama-3.1-8B, four rows of 32k tokens, read in chunks of 2,048."""
    config = dataclasses.replace(planner.find_config("meta-llama/Llama-3.1-8B"), num_layers=layers)
    hardware = planner.find_hardware(topology)
    split = planner.default_split(config)
    start = Job(config, hardware, 1, hardware.devices, 4, 32768, 2048, split, RazorConfig())
    return dataclasses.replace(start, **changes)


def close(plan: Job, step: planner.Step) -> compiler.Compiled:
    """Check that the compiler's answer is within 3 % of the arithmetic, and the cache written in place; return it."""
    memory, seen = planner.memory(plan), planner.compile_step(plan, step)
    assert not seen.refused
    assert abs(seen.needed / memory.of(step) - 1) < 0.03, (memory, seen)
    # The cache, a few numbers per row, and the padding of small arrays to tiles.
    assert memory.kv <= seen.aliased < 1.001 * memory.kv
    return seen


# Dense on one chip in a quick run: the program that does not fit.
@pytest.mark.parametrize("razor", [pytest.param(None, marks=pytest.mark.slow), RAZOR], ids=["dense", "int8"])
def test_one_chip(razor):
    assert close(job("v5e:1x1", 4, razor=razor), "decode").collectives == []


def test_a_mesh():
    by_slot = close(job("v5e:2x2", 4), "decode").collectives
    assert {found["op"] for found in by_slot} >= {"all-gather", "all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "layers"), [("v5e:1x1", 8), ("v5e:2x2", 8)])
def test_prefill(topology, layers):
    close(job(topology, layers), "prefill")


def test_a_program_that_does_not_fit_is_refused():
    plan = job("v5e:1x1", 4, batch=32, razor=None)
    memory, seen = planner.memory(plan), planner.compile_step(plan, "decode")
    assert memory.needed > plan.hardware.hbm
    assert "exceeds available HBM" in seen.refused
    assert abs(seen.needed / memory.of("decode") - 1) < 0.03


NAMES = """
import json, sys
from jax.experimental import topologies

for name in json.loads(sys.argv[1]):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    print(json.dumps([devices[0].device_kind, len(devices)]))
"""


def test_topologies_are_libtpus_own():
    names = [f"{kind}:{shape}" for kind, tpu in planner.hardware._TPUS.items() for shape in tpu.shapes]
    found = tpu_compiler.run(NAMES, names)
    ours = [planner.find_hardware(name) for name in names]
    assert found == [[hardware.device_kind, hardware.devices] for hardware in ours]
