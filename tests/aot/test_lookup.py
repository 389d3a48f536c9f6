"""Prompt-lookup decoding through the real TPU compiler: a block copies no cache."""

from __future__ import annotations

import pytest

from tests.support import tpu_compiler

COMPILE = """
import functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from razor_jax import HeadSplit, Params, RazorConfig, functional
from razor_jax.models.config import ModelConfig
from razor_jax.params import abstract_weights
from razor_jax.text import lookup, loop
from razor_jax.text.sampling import as_sampling

topology, shape, kv_dtype = json.loads(sys.argv[1])
mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:1]), ("x",))
sharding = NamedSharding(mesh, PartitionSpec())
L, B, V, CAPACITY = 2, 1, shape["args"][1], 32768
config = ModelConfig(*shape["args"][:4], L, *shape["args"][5:])
split = HeadSplit(((1,), (0, 1)), config.num_kv_heads)
params = Params(abstract_weights(config, jnp.bfloat16), config, heads=split)
razor = RazorConfig.compact(4096, kv_dtype=kv_dtype)

def begin():
    cache = functional.init_cache(params, batch=B, capacity=CAPACITY, razor=razor)
    cache = cache.replace(seen=jnp.zeros((B, V), bool))
    zeros = jnp.zeros((B,), jnp.int32)
    keys = jax.vmap(jax.random.key)(jnp.zeros((B,), jnp.uint32))
    state = loop.LoopState(cache, zeros, zeros, zeros > 0, zeros > 0, jnp.zeros((B, V), jnp.int32), keys)
    text = lookup.Text(jnp.zeros((B, CAPACITY + 1), jnp.int32), zeros, jnp.int32(0))
    return state, text, jnp.zeros((8,), jnp.int32), zeros, jnp.int32(32)

with jax.set_mesh(mesh):
    place = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding))
    arguments = place(jax.eval_shape(begin))
    cache = arguments[0].cache
    assert cache.spec.implementation == "pallas_tpu"
    traced = lookup.decode_block.trace(place(params), *arguments, place(as_sampling(None)), draft=8)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    full = [g.k for layer in cache.layers for g in layer if not g.windowed]
    print(json.dumps({"copies": copies(compiled, full)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_a_block_copies_no_full_group(kv_dtype):
    (seen,) = tpu_compiler.run(tpu_compiler.COPIES + COMPILE, ["v5e:2x2", tpu_compiler.LLAMA, kv_dtype])
    # The windowed groups are copied once per block, to go back to.
    assert not seen["copies"], seen
