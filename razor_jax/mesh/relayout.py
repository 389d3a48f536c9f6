"""Move a cache from one mesh to another by way of its form on a single device: slots in logical order, one mean."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ..cache import Group, KVCache
from .cache import with_cache_sharding
from .placement import Layout, MeshPlacement
from .slots import Shard


def logical(cache: KVCache) -> KVCache:
    """Return the cache as one device would store it, slot g in slot g. Pure; under jit data stays on the devices."""
    spec = cache.spec
    alone = dataclasses.replace(spec, placement=None)
    shards = Shard(spec.shards, jnp.arange(spec.shards, dtype=jnp.int32)[:, None])

    def group(g: Group) -> Group:
        slots = alone.slots(g.windowed, g.scope)

        def straight(x, axis):
            parts = x.reshape(*x.shape[:axis], spec.shards, -1, *x.shape[axis + 1 :])
            whole = parts.swapaxes(axis, axis + 1).reshape(x.shape)
            return jax.lax.slice_in_dim(whole, 0, slots, axis=axis)

        g = g.map_slots(straight)
        if g.k_mean is None or g.v_mean is None:
            return g
        n = shards.dropped(cache.length, cache.window, spec.sinks)  # [P, B]
        share = (n / jnp.maximum(n.sum(0), 1)).T[:, None, :, None]
        k_mean, v_mean = (jnp.sum(jnp.where(share > 0, x, 0.0) * share, 2, keepdims=True) for x in (g.k_mean, g.v_mean))
        return g.replace(k_mean=k_mean, v_mean=v_mean)

    if spec.shards == 1:
        return cache.replace(spec=alone)
    return cache.replace(layers=tuple(tuple(map(group, layer)) for layer in cache.layers), spec=alone)


def distributed(cache: KVCache, placement: MeshPlacement | None, layout: Layout | None = None) -> KVCache:
    """Return what `logical` returned, spread over a mesh; every device starts from the same means.

    Raises ValueError where batch or layout do not divide.
    """
    spec = cache.spec
    placement = None if placement is None else placement.for_cache(spec.heads, spec.razor, layout)
    if placement is None:
        return cache
    spec = dataclasses.replace(spec, placement=placement)
    P = spec.shards

    def group(g: Group) -> Group:
        slots = spec.slots(g.windowed, g.scope)

        def spread(x, axis):
            x = jnp.pad(x, [(0, slots - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
            parts = x.reshape(*x.shape[:axis], -1, P, *x.shape[axis + 1 :])
            return parts.swapaxes(axis, axis + 1).reshape(x.shape)

        g = g.map_slots(spread)
        if g.k_mean is None or g.v_mean is None:
            return g
        k_mean, v_mean = (jnp.repeat(x, P, axis=2) for x in (g.k_mean, g.v_mean))
        return g.replace(k_mean=k_mean, v_mean=v_mean)

    layers = tuple(tuple(map(group, layer)) for layer in cache.layers)
    return with_cache_sharding(cache.replace(layers=layers, spec=spec))
