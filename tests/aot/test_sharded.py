"""Models on eight chips through the real TPU compiler, with shapes of Llama-3-8B and uneven splits.

Caches by slot are written in place, without a copy or a gather, and temporaries of a prefill do not grow with depth.
"""

from __future__ import annotations

import pytest

from ..support import tpu_compiler
from ..support.tpu_compiler import COPIES, LLAMA

pytest.importorskip("libtpu", reason="the TPU compiler is in the extra 'aot': pip install -e '.[aot]'")

COMPILE = """
import dataclasses, functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from razor_jax import HeadSplit, Params, RazorConfig, functional, sharding
from razor_jax.mesh import MeshPlacement
from razor_jax.mesh.cache import cache_shardings
from razor_jax.planner import collectives
from razor_jax.models.config import ModelConfig
from razor_jax.params import abstract_weights

topology, form, shape, layers, kind, T, kv_dtype, layout = json.loads(sys.argv[1])
devices = list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
config = ModelConfig(*shape.pop("args"), **shape)
K = config.num_kv_heads
mesh = sharding.make_mesh(form, K, devices)
array = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
place = functools.partial(jax.tree.map, lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s))
for L in layers:
    config = dataclasses.replace(config, num_layers=L)
    weights = abstract_weights(config, jnp.bfloat16)
    kept = ((1,), (0, 1), (), tuple(range(K))) if layout == "slot" else (tuple(range(K)), ())
    split = HeadSplit((kept * L)[:L], K)
    weights = place(weights, sharding.weight_shardings(weights, mesh))
    params = Params(weights, config, heads=split, placement=MeshPlacement(mesh))
    razor, B = RazorConfig.compact(4096, kv_dtype=kv_dtype), mesh.shape["data"]
    make = functools.partial(functional.init_cache, params, batch=B, capacity=32768, razor=razor)
    cache = jax.eval_shape(make)
    assert (cache.spec.implementation, cache.spec.placement.layout) == ("pallas_tpu", layout)
    cache = place(cache, cache_shardings(cache))
    if kind == "decode":
        run, arguments = functional.decode, [params, cache, array((B,))]
    else:
        run = functools.partial(functional.extend_known, logits="last", fresh=kind == "prefill")
        arguments = [params, cache, array((B, T)), array((B,))]
    compiled = jax.jit(run, donate_argnums=1).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
    memory, parts = compiled.memory_analysis(), sharding.model_devices(mesh)
    found = collectives.read(compiled.as_text())
    print(json.dumps({
        "temporary": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "cache": cache.spec.kv_bytes(B) // mesh.size,
        "kv": 2 * T * K // mesh.shape["heads"] * config.head_dim * 2,
        "copies": copies(compiled, [jax.ShapeDtypeStruct((1, *x.shape[1:2], x.shape[2] // parts, *x.shape[3:]), x.dtype)
                                    for x in jax.tree.leaves(cache.layers)]),
        "collectives": found,
        "table": collectives.table(found),
    }))
"""


def compiled(topology, form, layers, kind, T=1, kv_dtype=None, layout="slot", shape=LLAMA):
    """Return the compiler's figures for one device."""
    return tpu_compiler.run(COPIES + COMPILE, [topology, form, shape, layers, kind, T, kv_dtype, layout])


@pytest.mark.parametrize(
    ("form", "kv_dtype"), [pytest.param("data=1,model=8", None, marks=pytest.mark.slow), ("data=2,model=4", "int8")]
)
def test_a_decode_step_by_slot_sends_no_cache(form, kv_dtype, record_property):
    (seen,) = compiled("v5e:2x4", form, [4], "decode", kv_dtype=kv_dtype)
    print(seen["table"])
    assert seen["aliased"] >= seen["cache"]
    assert seen["temporary"] < 0.2 * seen["cache"], seen
    assert not seen["copies"], seen
    # The largest collective moves logits; those of a layer move queries and partial results.
    assert sum(size * count for _, size, count, _ in seen["collectives"]) < 1 << 20, seen["table"]
    assert sum(count for op, _, count, _ in seen["collectives"] if op == "all-to-all") == 4


@pytest.mark.slow
def test_a_decode_step_by_head_needs_no_exchange():
    (seen,) = compiled("v5e:2x4", "data=1,model=8", [2], "decode", layout="head")
    print(seen["table"])
    assert not seen["copies"], seen
    assert {op for op, *_ in seen["collectives"]} == {"all-reduce"}


@pytest.mark.slow
def test_exact_prefill_needs_one_layer_at_a_time(record_property):
    shallow, deep = compiled("v5e:2x4", "data=1,model=8", [4, 8], "prefill", T=16384)
    print(deep["table"])
    growth = (deep["temporary"] - shallow["temporary"]) / 4 / deep["kv"]
    record_property("exact prefill on eight chips, temporaries per added layer, share of its K/V on one", growth)
    assert growth < 0.10


@pytest.mark.slow
def test_extending_by_slot_copies_no_cache():
    """With 2,048 tokens, every query meets the slots of every device."""
    (seen,) = compiled("v5e:2x4", "data=1,model=8", [2], "extend", T=2048)
    print(seen["table"])
    assert seen["aliased"] >= seen["cache"]
    assert not [shape for shape in seen["copies"] if len(shape) == 4], seen
