"""int8 and int4 kernels through the real TPU compiler: converted as they are read, never stored in bfloat16.

pytest -m 'slow or not slow' tests/aot/test_quantised_weights.py
"""

from __future__ import annotations

import pytest

from ..support import tpu_compiler

pytest.importorskip("libtpu", reason="the TPU compiler is in the extra 'aot': pip install -e '.[aot]'")

COMPILE = """
import functools, json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from razor_jax import HeadSplit, Params, RazorConfig, functional, sharding
from razor_jax.mesh import MeshPlacement
from razor_jax.mesh.cache import cache_shardings
from razor_jax.models.config import ModelConfig
from razor_jax.params import abstract_weights

topology, count, kind = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:count]
config = ModelConfig("llama", 128256, 4096, 14336, 2, 32, 8, 128, 131072)
mesh = sharding.make_mesh({"model": count}, 8, devices)
for weights in (None, "int8", "int4"):
    tree = abstract_weights(config, jnp.bfloat16, weights)
    place = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
    tree = jax.tree.map(place, tree, sharding.weight_shardings(tree, mesh))
    params = Params(tree, config, HeadSplit(((1,), ()), 8), placement=MeshPlacement(mesh))
    make = functools.partial(functional.init_cache, params, batch=1, capacity=16384, razor=RazorConfig.compact(4096))
    with jax.set_mesh(mesh):
        cache = jax.eval_shape(make)
    assert cache.spec.implementation == "pallas_tpu"
    cache = jax.tree.map(place, cache, cache_shardings(cache)) if count > 1 else cache
    array = lambda shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(mesh, jax.P()))
    with jax.set_mesh(mesh):
        if kind == "decode":
            call = jax.jit(functional.decode, donate_argnums=1).trace(params, cache, array((1,)))
        else:
            run = functools.partial(functional.extend_known, logits="last", fresh=True)
            call = jax.jit(run, donate_argnums=1).trace(params, cache, array((1, 1024)), array((1,)))
        program = call.lower(lowering_platforms=("tpu",)).compile()
    memory = program.memory_analysis()
    print(json.dumps({
        "arguments": memory.argument_size_in_bytes,
        "read": program.cost_analysis()["bytes accessed"],
        "temporary": memory.temp_size_in_bytes,
        "weights": sharding.weight_bytes(tree, mesh)[0],
        "kernel": 2 * 4096 * 14336 // count,
    }))
"""


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("kind", ["decode", pytest.param("extend", marks=pytest.mark.slow)])
def test_no_kernel_is_stored_in_bfloat16(kind, count, record_property):
    """Two layers of Llama-3-8B. The compiler reads int4 packed, two to a byte."""
    floats, *quantised = tpu_compiler.run(COMPILE, ["v5e:2x2", count, kind])
    for name, seen in zip(("int8", "int4"), quantised, strict=True):
        # All temporaries together are smaller than one layer's gate kernel in bfloat16.
        assert seen["temporary"] < floats["temporary"] + 0.1 * seen["kernel"], (floats, seen)
        saved, read, expected = (floats[key] - seen[key] for key in ("arguments", "read", "weights"))
        assert abs(saved - expected) < 0.01 * expected, (floats, seen)
        if kind == "decode":
            assert read > 0.98 * expected, (floats, seen)
            record_property(f"decode step on {count} v5e, {name}: bytes not read, of those saved", read / expected)
