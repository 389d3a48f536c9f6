"""Attention and writes of single layers on meshes, against one device: NaN in every slot and mean that must not be
read, and what is held afterwards equal slot by slot."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from razor_jax import HeadSplit, RazorConfig
from razor_jax import cache as kv
from razor_jax.functional import placement_of
from razor_jax.mesh import MeshPlacement, relayout

from ..support.meshes import BALANCED, SPLIT, G, K, mesh_of

B, H, CAPACITY, CHUNK, SINKS = 4, 8, 64, 12, 3
# Windows below, at and above the devices of the largest mesh; with SINKS, ends at odd places.
WINDOWS = (2, 5, 11, 8)
CALLS = [(CHUNK, [12, 5, 0, 9]), (1, [1, 1, 1, 0]), (CHUNK, [3, 12, 12, 0])] + [(1, [1, 1, 0, 1])] * 26


def numbers(*shape, seed):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, donate_argnums=0)
def step(cache, q, k, v, lengths):
    """Attend, then write, on every layer."""
    meta, after = kv.begin(cache, lengths, k.shape[2])
    run = functools.partial(placement_of(cache.spec).attend_and_write, q, k, v, meta=meta, slopes=None)
    outs, layers = zip(*(run(layer=layer) for layer in cache.layers), strict=True)
    return outs, after.replace(layers=layers)


def session(split, razor, dtype="float32", mesh=None, layout=None):
    """Outputs [calls][layers] of each row's new tokens, and the cache, which held NaN everywhere when it was empty."""
    placement = None if mesh is None else MeshPlacement(mesh).for_cache(split, razor, layout)
    spec = kv.make_spec(split, H, CAPACITY, razor, dtype, placement=placement)
    run = placement_of(spec)
    cache = run.init(spec, B)
    poison = {"int8": 0, "float8_e4m3fn": np.nan}
    layers = jax.tree.map(lambda x: jnp.full_like(x, poison.get(str(x.dtype), np.nan)), cache.layers)
    cache = cache.replace(layers=layers, window=jnp.asarray(WINDOWS, jnp.int32) if razor else cache.window)
    cache, outs = run.pin_cache(cache), []
    # Where a balanced split holds the heads that one device holds in order.
    at = (
        np.arange(K)
        if placement is None
        else np.argsort(np.concatenate(placement.group_positions(spec, cache.layers[0])))
    )
    for index, (T, lengths) in enumerate(CALLS):
        k, v = numbers(B, K, T, H, seed=2 * index), numbers(B, K, T, H, seed=2 * index + 1)
        q = numbers(B, K, T, G, H, seed=index).reshape(B, K, T * G, H)
        new = np.arange(T) < np.asarray(lengths)[:, None]
        k, v = (np.where(new[:, None, :, None], x, np.nan) for x in (k, v))
        out, cache = step(cache, q[:, at], k[:, at], v[:, at], np.asarray(lengths, np.int32))
        read = np.repeat(new, G, axis=1)[:, None, :, None]
        outs.append([np.where(read, np.asarray(x)[:, np.argsort(at)], 0) for x in out])
    return outs, cache


@functools.cache
def alone(split, razor, dtype="float32"):
    return session(split, razor, dtype)


RING = RazorConfig(sinks=SINKS, min_window=min(WINDOWS), window_divisor=3)
INT8_FP8 = RazorConfig(sinks=SINKS, min_window=2, kv_dtype="int8", windowed_kv_dtype="fp8")
CASES = [
    ("model=8", SPLIT, RING, "float32", None),
    ("data=2,model=4", SPLIT, INT8_FP8, "float32", None),
    ("model=3", HeadSplit(((0,), (1, 2)), K), RING, "float32", None),
    ("model=2", BALANCED, RING, "float32", "head"),
    ("model=8", SPLIT, None, "float32", None),
]
MORE = [
    ("data=2,model=4", SPLIT, RING, "float32", None),
    ("data=4", SPLIT, RING, "float32", None),
    ("model=2", BALANCED, RING, "float32", "slot"),
    ("data=2,model=2", SPLIT, None, "bfloat16", "head"),
    ("data=2,model=4", SPLIT, RazorConfig(sinks=SINKS, min_window=2, compensation=False), "bfloat16", None),
    ("model=8", SPLIT, RazorConfig(sinks=SINKS, min_window=2, kv_dtype="int8"), "float32", None),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


@pytest.mark.parametrize(("mesh", "split", "razor", "dtype", "layout"), CASES)
def test_a_mesh_equals_one_device(mesh, split, razor, dtype, layout, record_property):
    want, reference = alone(split, razor, dtype)
    got, cache = session(split, razor, dtype, mesh_of(mesh), layout)
    assert layout is None or cache.spec.placement.layout == layout
    worst = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 if dtype == "float32" else 2e-2)
        worst = max(worst, float(np.max(np.abs(a - b))))
    if dtype == "float32":
        record_property("a layer on a mesh against one device, max abs error", worst)
    same_contents(relayout.logical(cache), reference)


def same_contents(cache, reference):
    """Slots that are held are equal, bit for bit, and the others were never written; means to 1e-5."""
    for row in range(B):
        for mine, other in zip(jax.tree.leaves(cache.layers), jax.tree.leaves(reference.layers), strict=True):
            if mine.dtype == jnp.float32 and mine.shape[2] == 1 and mine.shape[3] == H:
                if int(reference.dropped[row]) > 0:
                    np.testing.assert_allclose(mine[row], other[row], atol=1e-5)
                continue
            np.testing.assert_array_equal(np.asarray(mine[row], np.float32), np.asarray(other[row], np.float32))
    for name in ("length", "window", "overflow"):
        np.testing.assert_array_equal(getattr(cache, name), getattr(reference, name))


def test_rings_were_rolled_over_twice():
    _, cache = alone(SPLIT, RING)
    assert (np.asarray(cache.dropped) > 2 * np.asarray(WINDOWS)).sum() >= 2


def test_there_and_back():
    """From one device to a mesh, to another mesh, and back; each goes on from what it was given."""
    _, reference = alone(SPLIT, RING)
    here = relayout.logical(reference)
    for mesh in ("model=8", "data=2,model=2"):
        there = jax.jit(relayout.distributed, static_argnums=1)(here, MeshPlacement(mesh_of(mesh)))
        assert there.spec.shards == (8 if mesh == "model=8" else 2)
        # By way of the host, as other devices are to have it.
        here = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), jax.jit(relayout.logical)(there))
        same_contents(here, reference)
    q, k, v = (numbers(B, K, n, H, seed=90 + n) for n in (G, 1, 1))
    args = q, k, v, np.ones(B, np.int32)
    want, _ = step(jax.tree.map(jnp.copy, reference), *args)
    got, _ = step(relayout.distributed(here, MeshPlacement(mesh_of("data=2,model=4"))), *args)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
