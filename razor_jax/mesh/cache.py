"""The KV cache on a mesh: where its arrays are, and how the tokens of a call get to the devices that store them.

By slot an array is the devices' shares (`slots.py`) one after the other, and each device has means of its own, over the
tokens dropped there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float

from .. import cache as kv
from ..cache import AttentionMetadata, CacheSpec, Group, KVCache
from ..sharding import HEADS, MODEL, ROWS
from .slots import Shard, most_tokens


def _init(spec: CacheSpec, batch: int, prompt_lengths: jax.Array | np.ndarray | None) -> KVCache:
    return with_cache_sharding(kv.init(spec, batch, prompt_lengths))


# Compiled: otherwise one device would allocate what all of them share.
init = jax.jit(_init, static_argnums=(0, 1))


def broadcast(cache: KVCache, batch: int, capacity: int) -> KVCache:
    """Run `cache.broadcast` on a mesh: by slot the share of every device grows."""
    spec = dataclasses.replace(cache.spec, capacity=max(capacity, cache.spec.capacity))

    def grow(group: Group) -> Group:
        extra = (spec.slots(group.windowed, group.scope) - group.k.shape[2]) // spec.shards

        def shares(x, axis):
            shape = (*x.shape[:axis], spec.shards, x.shape[axis] // spec.shards, *x.shape[axis + 1 :])
            grown = jnp.pad(x.reshape(shape), [(0, extra if i == axis + 1 else 0) for i in range(5)])
            return grown.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

        return group.map_slots(shares)

    return with_cache_sharding(kv.repeat_rows(cache, grow, batch, spec))


def cache_pspecs(tree: Any, spec: CacheSpec, batch: int) -> list[PartitionSpec]:
    """Return the PartitionSpec of each leaf of a cache, or of a part of one; leaves may be shapes.

    Every device knows what a row has seen.
    """
    assert spec.placement is not None
    rows = spec.placement.rows(batch)
    slots, scales = PartitionSpec(rows, None, MODEL), PartitionSpec(rows, None, None, MODEL)
    by_slot = {"k": slots, "v": slots, "k_mean": slots, "v_mean": slots, "k_scale": scales, "v_scale": scales}
    by_head = dict.fromkeys(by_slot, PartitionSpec(rows, MODEL))
    names = by_head if spec.placement.layout == "head" else by_slot
    paths = (path[-1].name for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])
    return [names.get(name, PartitionSpec()) for name in paths]


def cache_shardings(cache: KVCache) -> KVCache:
    """Return the NamedSharding of each leaf of a cache, arrays or their shapes, as a cache."""
    assert cache.spec.placement is not None, "a cache on one device has no mesh"
    mesh = cache.spec.placement.mesh
    leaves = [NamedSharding(mesh, pspec) for pspec in cache_pspecs(cache, cache.spec, cache.batch)]
    return jax.tree.unflatten(jax.tree.structure(cache), leaves)


def with_cache_sharding(cache: KVCache) -> KVCache:
    """Return the cache with each leaf pinned where `cache_pspecs` says."""
    assert cache.spec.placement is not None, "a cache on one device has no mesh"
    mesh = cache.spec.placement.mesh
    leaves, tree = jax.tree.flatten(cache)
    pspecs = cache_pspecs(cache, cache.spec, cache.batch)
    pinned = (lax.with_sharding_constraint(x, NamedSharding(mesh, at)) for x, at in zip(leaves, pspecs, strict=True))
    return jax.tree.unflatten(tree, pinned)


def write(layer: tuple[Group, ...], k: jax.Array, v: jax.Array, meta: AttentionMetadata) -> tuple[Group, ...]:
    """Write, on one device inside `shard_map`, the tokens that `exchange_tokens` returned."""
    placement, spec = meta.spec.placement, meta.spec
    assert placement is not None
    if spec.shards == 1:
        return kv.write(layer, k, v, meta)
    here, groups = Shard(spec.shards, lax.axis_index(MODEL)), []
    for group, heads in zip(layer, placement.group_positions(spec, layer), strict=True):
        ring = meta.ring(group)
        length, end = (here.length(x, *ring) for x in (meta.length, meta.length + meta.new))
        new = take_heads(k, heads), take_heads(v, heads)
        groups.append(kv.write_group(group, *new, length, end - length, *here.ring(*ring), spec))
    return tuple(groups)


def exchange_tokens(
    layer: tuple[Group, ...], k: Float[jax.Array, "B K T H"], v: Float[jax.Array, "B K T H"], meta: AttentionMetadata
) -> tuple[jax.Array, jax.Array]:
    """Return a call's k, v [B, K, T, H] as this device has to `write` them.

    By slot a device computes every token of its own heads, and stores tokens of every head that belong to its slots.
    Devices with different heads trade one for the other.
    """
    spec, placement, T = meta.spec, meta.spec.placement, k.shape[2]
    assert placement is not None
    if spec.shards == 1:
        return k, v
    if T == 1:
        return lax.all_gather(k, HEADS, axis=1, tiled=True), lax.all_gather(v, HEADS, axis=1, tiled=True)
    peers = jnp.arange(placement.mesh.shape[HEADS], dtype=jnp.int32) * placement.mesh.shape[ROWS]
    there = Shard(spec.shards, (peers + lax.axis_index(ROWS))[:, None])
    most = max(most_tokens(T, spec.shards, spec.shortest_ring(g.scope) if g.windowed else None) for g in layer)
    # int32 [groups, heads, B, T'], and the group of each head of this device
    wanted = jnp.stack([there.tokens(meta.length, *meta.ring(group), most) for group in layer])
    group_of = np.zeros((spec.heads.num_kv_heads,), np.int32)
    for index, heads in enumerate(placement.group_positions(spec, layer)):
        group_of[heads] = index
    mine = lax.dynamic_slice_in_dim(jnp.asarray(group_of), lax.axis_index(HEADS) * k.shape[1], k.shape[1])
    index = jnp.clip(wanted[mine], 0, T - 1).transpose(1, 2, 0, 3)[..., None]  # [heads, B, k, T', 1]

    def trade(x):
        parts = jnp.take_along_axis(x[None], index, axis=3)
        return lax.all_to_all(parts, HEADS, split_axis=0, concat_axis=2, tiled=True)[0]

    return trade(k), trade(v)


def take_heads(x: jax.Array, heads: np.ndarray) -> jax.Array:
    """Return KV heads of x [B, K, …]; a slice where they are consecutive."""
    first, last = int(heads[0]), int(heads[-1])
    if np.array_equal(heads, np.arange(first, last + 1)):
        return x[:, first : last + 1]
    return x[:, heads]
