"""Whole models on the kernels through the real TPU compiler: nothing copied, caches in place, memory flat in depth.

    pip install -e '.[aot]'
    pytest tests/aot

Shapes of Llama-3-8B, Qwen2.5-7B and Llama-3.2-1B (H = 64) at 32k tokens, with four layers (all layers with `-m slow`)
and very uneven splits: layers with one, two, no and only retrieval heads. A quick run compiles each shape and each
generation once; every pair of them is slow.
"""

from __future__ import annotations

import itertools

import pytest

from ..support import tpu_compiler
from ..support.tpu_compiler import COPIES, LLAMA

pytest.importorskip("libtpu", reason="the TPU compiler is in the extra 'aot': pip install -e '.[aot]'")

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
QWEN = {"args": ["qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 32768], "qkv_bias": True}
NARROW = {"args": ["llama", 128256, 2048, 8192, 16, 32, 8, 64, 131072], "tie_embeddings": True}

COMPILE = """
import dataclasses, functools, json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from razor_jax import HeadSplit, Params, RazorConfig, functional
from razor_jax.models.config import ModelConfig
from razor_jax.params import abstract_weights

topology, shape, layers, kind, T, kv_dtype = json.loads(sys.argv[1])
mesh = Mesh(np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:1]), ("x",))
sharding = NamedSharding(mesh, PartitionSpec())
array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
config = ModelConfig(*shape.pop("args"), **shape)
for L in layers or [config.num_layers]:
    config = dataclasses.replace(config, num_layers=L)
    K = config.num_kv_heads
    split = HeadSplit((((1,), (0, 1), (), tuple(range(K))) * L)[:L], K)
    params = Params(abstract_weights(config, jnp.bfloat16), config, heads=split)
    razor = RazorConfig.compact(4096, kv_dtype=kv_dtype)
    with jax.set_mesh(mesh):
        place = functools.partial(jax.tree.map, lambda a: array(a.shape, a.dtype))
        make = functools.partial(functional.init_cache, params, batch=1, capacity=32768, razor=razor)
        cache = place(jax.eval_shape(make))
        assert cache.spec.implementation == "pallas_tpu"
        arguments = [place(params), cache, array((1, T), jnp.int32), array((1,), jnp.int32)]
        if kind == "decode":
            run, arguments = functional.decode, [*arguments[:2], arguments[3]]
        else:
            run = functools.partial(functional.extend_known, logits="last", fresh=kind == "prefill")
        compiled = jax.jit(run, donate_argnums=1).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
        memory = compiled.memory_analysis()
        print(json.dumps({
            "temporary": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "cache": cache.spec.kv_bytes(1),
            "layer": sum(x.size * 2 for x in jax.tree.leaves(params.weights["blocks_0"])),
            "kv": 2 * T * K * config.head_dim * 2,
            "copies": copies(compiled, jax.tree.leaves(cache.layers)),
        }))
"""


def compiled(topology, shape, layers, kind, T=1, kv_dtype=None):
    """Return the `memory_analysis` of a call of T tokens for models of these depths, and sizes to compare it with."""
    return tpu_compiler.run(COPIES + COMPILE, [topology, shape, layers, kind, T, kv_dtype])


def in_place(seen):
    assert seen["aliased"] >= seen["cache"]
    assert seen["temporary"] < 0.1 * seen["cache"], seen
    assert not seen["copies"] or "async-update" in str(seen["copies"]), seen


SHAPES = {"llama": (LLAMA, None), "qwen-int8": (QWEN, "int8"), "narrow": (NARROW, None)}
QUICK = {("llama", "v5e:2x2"), ("narrow", "v5p:2x2x1"), ("qwen-int8", "v6e:2x2"), ("llama", "tpu7x:2x2x1")}
PAIRS = [
    pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow)
    for pair in itertools.product(SHAPES, TOPOLOGIES)
]


@pytest.mark.parametrize(("shape", "topology"), PAIRS)
def test_a_decode_step_copies_no_cache(shape, topology):
    shape, kv_dtype = SHAPES[shape]
    (seen,) = compiled(topology, shape, [4], "decode", kv_dtype=kv_dtype)
    in_place(seen)


@pytest.mark.parametrize("topology", ["v5e:2x2", *(pytest.param(t, marks=pytest.mark.slow) for t in TOPOLOGIES[1:])])
def test_extending_copies_no_cache(topology):
    """With 2,048 tokens temporaries are activations, and more layers need no more of them.

    (On 7x the compiler also changes the layout of one layer's weights for the loop.)
    """
    shallow, deep = compiled(topology, LLAMA, [4, 8], "extend", T=2048)
    for seen in (shallow, deep):
        assert seen["aliased"] >= seen["cache"]
    assert (deep["temporary"] - shallow["temporary"]) / 4 < 0.05 * deep["cache"] / 8


@pytest.mark.parametrize("shape", [LLAMA, pytest.param(QWEN, marks=pytest.mark.slow)], ids=["llama", "qwen"])
def test_exact_prefill_needs_one_layer_at_a_time(shape, record_property):
    """From 4 to 8 layers, temporaries grow by < 10 % of one layer's K/V per layer."""
    shallow, deep = compiled("v5e:2x2", shape, [4, 8], "prefill", T=16384)
    growth = (deep["temporary"] - shallow["temporary"]) / 4 / deep["kv"]
    record_property("exact prefill on TPU, temporaries per added layer, share of its K/V", float(growth))
    assert growth < 0.10


# Without Llama-3-8B on v5e: its weights alone take 14.96 of 15.75 GiB, and the compiler rightly refuses.
WHOLE = [(QWEN, "v5e:2x2"), *((shape, topology) for shape in (LLAMA, QWEN) for topology in TOPOLOGIES[1:])]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "topology"), WHOLE, ids=[f"{shape['args'][0]}-{t}" for shape, t in WHOLE])
def test_whole_models(shape, topology):
    (decode,) = compiled(topology, shape, None, "decode")
    in_place(decode)
    (extend,) = compiled(topology, shape, None, "extend", T=2048)
    assert extend["aliased"] >= extend["cache"]
    # Activations, and on 7x one layer's weights in another layout.
    assert extend["temporary"] < 0.2e9 + extend["layer"]
