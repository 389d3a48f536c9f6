"""init_cache, extend and decode of a whole model on meshes, against one device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import razor_jax
from razor_jax import HeadSplit, RazorConfig, functional, sharding, with_heads
from razor_jax import cache as kv
from razor_jax.models import ModelConfig
from razor_jax.planner import collectives

from ..support.meshes import BALANCED, CONFIG, SPLIT, K, on, one_device

B, CAPACITY = 4, 640
RAZOR = RazorConfig(sinks=3, min_window=20, window_divisor=4)
LENGTHS, MORE, LAST = (np.array(n, np.int32) for n in ([300, 31, 0, 270], [5, 16, 16, 0], [300, 300, 1, 0]))

extend = jax.jit(functional.extend_known, static_argnames=("logits", "fresh"))


@functools.partial(jax.jit, static_argnames="steps")
def roll(params, cache, token, steps: int):
    """Logits [steps, B, V] of greedy decode steps; row 2 sits out every third."""

    def step(carry, index):
        cache, token = carry
        active = (jnp.arange(B) != 2) | (index % 3 != 0)
        logits, cache = functional.decode(params, cache, token, active)
        return (cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)), logits

    (cache, _), logits = jax.lax.scan(step, (cache, token), jnp.arange(steps))
    return logits, cache


def session(params, razor=RAZOR, layout=None, steps=200):
    """Exact prefill in chunks, a call onto the cache, decode steps, and a row that would overflow."""
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (B, 300)).astype(np.int32)
    cache = functional.init_cache(
        params, batch=B, capacity=CAPACITY, razor=razor, prompt_lengths=np.array([300, 31, 16, 270]), layout=layout
    )
    first, cache = extend(params, cache, tokens, LENGTHS, "last", fresh=True)
    second, cache = extend(params, cache, tokens, MORE, "all", fresh=False)
    third, cache = roll(params, cache, tokens[:, 0], steps)
    before = cache
    fourth, cache = extend(params, cache, tokens, LAST, "all", fresh=False)
    # Row 0 would overflow, and its logits are nobody's.
    second, fourth = (
        np.where((np.arange(300) < n[:, None])[..., None], x, 0) for x, n in ((second, MORE), (fourth, LAST))
    )
    fourth[0] = 0
    return [np.asarray(first), second, np.asarray(third), fourth], before, cache


@functools.cache
def alone(split, razor=RAZOR):
    return session(one_device(split), razor)


def check(params, layout, record_property, split=SPLIT, razor=RAZOR):
    want, _, reference = alone(split, razor)
    got, before, cache = session(params, razor, layout)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    record_property(
        f"logits on a mesh, by {before.spec.placement.layout}, over the largest",
        max(float(np.max(np.abs(a - b)) / np.abs(b).max()) for a, b in zip(got, want, strict=True)),
    )
    np.testing.assert_array_equal(cache.overflow, [True, False, False, False])
    np.testing.assert_array_equal(cache.length, reference.length)
    np.testing.assert_array_equal(cache.dropped, reference.dropped)
    # Untouched where a row would overflow, or got no tokens.
    for a, b in zip(jax.tree.leaves(before.layers), jax.tree.leaves(cache.layers), strict=True):
        np.testing.assert_array_equal(a[np.array([0, 3])], b[np.array([0, 3])])
    return cache


def test_uneven_heads_by_slot(record_property):
    cache = check(on(one_device(), "data=2,model=4"), None, record_property)
    assert cache.spec.placement.layout == "slot"
    assert (np.asarray(cache.dropped) > 2 * np.asarray(cache.window))[[0, 1]].any()
    equal_bytes(cache)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["model=8", "data=4", "model=2"])
def test_other_meshes(mesh, record_property):
    equal_bytes(check(on(one_device(), mesh), None, record_property))


@pytest.mark.slow
def test_balanced_heads_by_head_and_by_slot(record_property):
    params = on(one_device(BALANCED), "model=2")
    assert check(params, None, record_property, BALANCED).spec.placement.layout == "head"
    assert check(params, "slot", record_property, BALANCED).spec.placement.layout == "slot"


def equal_bytes(cache):
    """Every device holds as much as every other, as predicted; of live arrays."""
    devices = dict.fromkeys(cache.spec.placement.mesh.devices.flat, 0)
    for x in jax.tree.leaves(cache.layers):
        for shard in x.addressable_shards:
            devices[shard.device] += shard.data.nbytes
    assert set(devices.values()) == {kv.device_bytes(cache)} == {cache.spec.kv_bytes(cache.batch) // len(devices)}


@pytest.mark.parametrize("split", [HeadSplit.none(3, K), HeadSplit(((0, 1, 2), (), (3,)), K), HeadSplit.all(3, K)])
def test_equal_bytes_for_any_split(split):
    params = on(one_device(split), "data=2,model=4")
    cache = functional.init_cache(params, batch=2, capacity=100, razor=RazorConfig.compact(9), layout="slot")
    equal_bytes(cache)


# --- What a step costs ---------------------------------------------------------------------------------


@functools.cache
def compiled(split, layout, capacity=4096, mesh="model=4"):
    config = ModelConfig("llama", 64, 32, 48, 2, 2 * K, K, 16, 4096)
    params, batch = on(one_device(split, config), mesh), sharding.parse(mesh)["data"]
    razor = RazorConfig.compact(capacity // 4)
    cache = functional.init_cache(params, batch=batch, capacity=capacity, razor=razor, layout=layout)
    return jax.jit(functional.decode, donate_argnums=1).lower(params, cache, np.zeros(batch, np.int32)).compile(), cache


EVEN, UNEVEN = HeadSplit(((0, 1, 2, 3), ()), K), HeadSplit(((1,), ()), K)


def in_place(program, cache):
    """The cache is written where it lies, and nothing else of a size is."""
    mine = kv.device_bytes(cache)
    assert mine <= program.memory_analysis().alias_size_in_bytes < 1.01 * mine


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("mesh", ["model=4", pytest.param("data=4", marks=pytest.mark.slow)])
def test_a_decode_step_keeps_no_second_cache(mesh):
    """Written in place, temporaries a fraction of one device's cache, no cache sent anywhere."""
    program, cache = compiled(UNEVEN, "slot", 131072, mesh)
    in_place(program, cache)
    memory, mine = program.memory_analysis(), kv.device_bytes(cache)
    assert memory.temp_size_in_bytes < 0.2 * mine
    assert all(c.bytes < 0.02 * mine for c in collectives.read(program.as_text()))


@pytest.mark.usefixtures("unchecked")
def test_collectives_by_head_and_by_slot(record_property):
    """By head a layer has the two sums of its products; by slot its queries, keys, values and partial results move
    besides, and not one byte of the cache."""
    found = {}
    for layout in ("head", "slot"):
        program, cache = compiled(EVEN, layout)
        in_place(program, cache)
        found[layout] = collectives.read(program.as_text())
    count = {
        layout: {op: sum(c.count for c in kinds if c.op == op) for op in {c.op for c in kinds}}
        for layout, kinds in found.items()
    }
    for layout, kinds in found.items():
        for op, n in count[layout].items():
            size = sum(c.bytes * c.count for c in kinds if c.op == op)
            record_property(f"a decode step by {layout}, {n} × {op}: bytes together", float(size))
    assert "all-to-all" not in count["head"]
    assert count["slot"]["all-to-all"] == 2
    assert count["slot"]["all-gather"] >= count["head"].get("all-gather", 0) + 2
    assert count["slot"]["all-reduce"] == count["head"]["all-reduce"]


# --- Errors --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_refusals():
    params, here = on(one_device(), "data=2,model=4"), one_device()
    make = functools.partial(functional.init_cache, capacity=20, razor=RazorConfig.compact(4))
    with pytest.raises(ValueError, match=r"batch=3 does not divide over data=2 of the mesh: make it a multiple of 2"):
        make(params, batch=3)
    with pytest.raises(ValueError, match=r"layout='head' over 4 devices: .* \[0, 1, 4\] of 4 retrieval heads"):
        make(params, batch=2, layout="head")
    with pytest.raises(ValueError, match=r"layout='tail': 'slot', 'head', or None"):
        make(params, batch=2, layout="tail")
    with pytest.raises(ValueError, match=r"cache is on one device, the params on a mesh data=2,model=4"):
        functional.decode(params, make(here, batch=2), np.zeros(2, np.int32))
    with pytest.raises(ValueError, match=r"cache is on a mesh data=2,model=4, the params on one device"):
        razor_jax.generate(here, np.arange(3), cache=make(params, batch=2), max_new_tokens=2)


def test_a_mesh_of_one_device_is_none():
    params = on(one_device(), "model=1")
    assert params.mesh is not None
    assert functional.init_cache(params, batch=3, capacity=20, razor=None).spec.placement is None


def test_heads_move_and_weights_stay_where_they_are():
    params = on(one_device(), "model=2")
    moved = with_heads(params, BALANCED)
    assert moved.order(0) == (0, 1, 2, 3)  # (0 | 1) on one device, (2 | 3) on the other
    assert moved.order(1) == (1, 0, 3, 2)
    for a, b in zip(jax.tree.leaves(params.weights), jax.tree.leaves(moved.weights), strict=True):
        assert a.sharding == b.sharding
    back = with_heads(moved, SPLIT)
    for a, b in zip(jax.tree.leaves(params.weights), jax.tree.leaves(back.weights), strict=True):
        np.testing.assert_array_equal(a, b)
