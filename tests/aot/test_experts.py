"""Mixture of experts through the real TPU compiler, with the shapes of Qwen3-30B-A3B.

pytest -m 'slow or not slow' tests/aot/test_experts.py

prints the bytes and operations of docs/models.md: of `experts.mix`, which the model runs, of `jax.lax.ragged_dot` on
sorted rows, and of gathering the weights of the chosen experts.
"""

from __future__ import annotations

import dataclasses

import pytest

from razor_jax import RazorConfig, planner
from razor_jax.planner import Job

from ..support import tpu_compiler

pytest.importorskip("libtpu", reason="the TPU compiler is in the extra 'aot': pip install -e '.[aot]'")

E, D, F, CHOSEN = 128, 2048, 768, 8
ONE = 3 * D * F  # weights of an expert

WAYS = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from razor_jax.models import Experts, experts

E, D, F, k, rows, type_ = json.loads(sys.argv[1])
device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
mesh = Mesh(np.array([device]), ("x",))
array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
shapes = {"gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
maps = {name: {"kernel": array(shape, jnp.dtype(type_))} for name, shape in shapes.items()}
if type_ == "int8":
    for name, shape in shapes.items():
        maps[name]["scale"] = array((E, 1, shape[2]), jnp.float32)
x, logits = array((rows, D), jnp.bfloat16), array((rows, E), jnp.bfloat16)


def mix(x, logits, maps):
    return experts.mix(x, experts.shares(logits, Experts(E, k, F, True)), maps)


def choose(logits):
    values, chosen = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), k)
    return values / values.sum(-1, keepdims=True), chosen


def ragged(x, logits, maps):
    values, chosen = choose(logits)
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=E).astype(jnp.int32)

    def linear(y, name):
        out = lax.ragged_dot(y, maps[name]["kernel"].astype(y.dtype), sizes)
        return (out * maps[name]["scale"][flat[order], 0]).astype(y.dtype) if "scale" in maps[name] else out

    rows = x[order // k]
    out = linear(jax.nn.silu(linear(rows, "gate")) * linear(rows, "up"), "down")
    return jnp.einsum("rkd,rk->rd", out[jnp.argsort(order)].reshape(*chosen.shape, -1).astype(jnp.float32), values)


def gather(x, logits, maps):
    values, chosen = choose(logits)

    def linear(spec, y, name):
        out = jnp.einsum(spec, y, maps[name]["kernel"][chosen].astype(y.dtype))
        return (out * maps[name]["scale"][chosen, 0]).astype(y.dtype) if "scale" in maps[name] else out

    out = jax.nn.silu(linear("rd,rkdf->rkf", x, "gate")) * linear("rd,rkdf->rkf", x, "up")
    return jnp.einsum("rkd,rk->rd", linear("rkf,rkfd->rkd", out, "down").astype(jnp.float32), values)


for way in (mix, ragged, *([gather] if rows == 1 else [])):
    with jax.set_mesh(mesh):
        program = jax.jit(way).trace(x, logits, maps).lower(lowering_platforms=("tpu",)).compile()
    cost = program.cost_analysis()
    print(json.dumps({
        "way": way.__name__,
        "bytes": cost["bytes accessed"],
        "flops": cost["flops"],
        "temporary": program.memory_analysis().temp_size_in_bytes,
    }))
"""


@pytest.mark.parametrize("type_", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_a_decode_step_reads_the_chosen_experts(type_, record_property):
    """The compiler counts a loop's body once: one pass reads one expert, and there is one pass per chosen expert."""
    mix, ragged, gather = tpu_compiler.run(WAYS, [E, D, F, CHOSEN, 1, type_])
    size = ONE * (2 if type_ == "bfloat16" else 1)
    assert size < mix["bytes"] < 1.2 * size
    assert mix["temporary"] < 1 << 20
    # Gathered weights are stored before they are read, ragged_dot's int8 kernels as bfloat16.
    assert gather["bytes"] > 5 * CHOSEN * size
    assert gather["temporary"] > CHOSEN * size
    if type_ == "int8":
        assert ragged["temporary"] >= 2 * E * D * F
    for seen in (mix, ragged, gather):
        times = CHOSEN if seen is mix else 1
        record_property(f"one row, {type_}, {seen['way']}: bytes", float(seen["bytes"] * times))
        record_property(f"one row, {type_}, {seen['way']}: temporary bytes", float(seen["temporary"]))


def test_a_chunk_of_a_prompt_multiplies_less_than_ragged_dot(record_property):
    mix, ragged = tpu_compiler.run(WAYS, [E, D, F, CHOSEN, 256, "bfloat16"])
    assert E * mix["flops"] < ragged["flops"] / 7
    for seen in (mix, ragged):
        times = E if seen is mix else 1
        record_property(f"256 rows, {seen['way']}: operations with every expert chosen", float(seen["flops"] * times))


def job(topology: str, weights: str = "bfloat16") -> Job:
    """Two layers, one row of 32k tokens, read in one call."""
    config = dataclasses.replace(planner.find_config("Qwen/Qwen3-30B-A3B"), num_layers=2)
    hardware = planner.find_hardware(topology)
    split = planner.default_split(config)
    return Job(config, hardware, 1, hardware.devices, 1, 32768, 32768, split, RazorConfig(), weights)


@pytest.mark.parametrize(
    ("topology", "weights"),
    [pytest.param("v5e:2x4", "bfloat16", marks=pytest.mark.slow), ("v5e:2x4", "int8"), ("v6e:2x2", "bfloat16")],
)
def test_decode_on_a_mesh_moves_no_expert(topology, weights):
    plan = job(topology, weights)
    memory, seen = planner.memory(plan), planner.compile_step(plan, "decode")
    assert abs(seen.needed / memory.of("decode") - 1) < 0.03, (memory, seen)
    assert seen.temporaries < D * F * 2  # smaller than one kernel of one expert
    assert seen.collectives
    assert all(found["bytes"] < D * F for found in seen.collectives)


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x2"])
def test_prefill_on_a_mesh_stores_no_second_copy_of_the_experts(topology):
    plan = job(topology)
    memory, seen = planner.memory(plan), planner.compile_step(plan, "prefill")
    assert not seen.refused
    assert seen.needed < memory.of("prefill")
    assert seen.temporaries < 3 * E * D * F * 2 / plan.model / 2  # of one layer's experts on a device, half
