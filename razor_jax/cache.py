"""The KV cache: a static-shape pytree split into head groups, and the pure operations on it.

A *full* group keeps every token of its KV heads, position p in slot p. A *windowed* group keeps N0 sinks, a
ring of the W newest other tokens and, in float32, the means of all it dropped:

    slots   | sinks 0 … N0-1 | ring N0 … N0+W-1 |      position p ≥ N0 lives in slot N0 + (p - N0) mod W
    means   k_mean, v_mean over the n = max(0, length - N0 - W) dropped tokens

A group of an ALiBi model has a *scope*, the ring's length for every row, and no sinks and no means.

n is derived, never stored, and a row's valid slots are always a prefix. Letters as in `models.transformer`,
and S cache slots. W is each row's own (`KVCache.window`), inside the static allocation.

On a mesh a group lies by head or by slot (`spec.py`). By slot its arrays are the devices' shares (`slots.py`) one
after the other, and each has means of its own, of the tokens that were dropped there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from .kernels import cache_write
from .kernels.cache_write import GroupArrays
from .kernels.quantize import INT8, quantize
from .mesh.slots import Shard, most_tokens
from .sharding import HEADS, MODEL, ROWS
from .spec import CacheSpec, ring_length
from .spec import make_spec as make_spec


class Group(flax.struct.PyTreeNode):
    """KV heads of one layer that keep the same things.

    Attributes:
      k, v: [B, K_group, S, H].
      k_mean, v_mean: float32 [B, K_group, 1, H], or None without a compensation token; by slot [B, K_group, P, H].
      windowed: sinks and a ring, or every token.
      k_scale, v_scale: float32 [B, K_group, 1, S] of an int8 cache, or None.
      scope: tokens that a ring of an ALiBi model keeps, else 0.
    """

    k: jax.Array
    v: jax.Array
    k_mean: jax.Array | None
    v_mean: jax.Array | None
    windowed: bool = flax.struct.field(pytree_node=False)
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    scope: int = flax.struct.field(pytree_node=False, default=0)

    @property
    def stored(self) -> GroupArrays:
        """The arrays, as the kernels take them."""
        return GroupArrays(self.k, self.v, self.k_scale, self.v_scale, self.k_mean, self.v_mean)

    def with_slots(self, change) -> Group:
        """The group with `change(x, axis)` made to every array that has slots, on `axis`."""
        scales = (x if x is None else change(x, 3) for x in (self.k_scale, self.v_scale))
        k_scale, v_scale = scales
        return self.replace(k=change(self.k, 2), v=change(self.v, 2), k_scale=k_scale, v_scale=v_scale)


class KVCache(flax.struct.PyTreeNode):
    """The state of B sequences. Every leaf has a leading batch axis; all else is static.

    Attributes:
      layers: each layer's head groups, retrieval heads first.
      length: int32 [B], tokens each row has seen.
      window: int32 [B], W of each row; 0 until the first `extend` sets it from its lengths.
      overflow: bool [B], rows that were asked to hold more than the capacity and were left untouched.
    """

    layers: tuple[tuple[Group, ...], ...]
    length: jax.Array
    window: jax.Array
    overflow: jax.Array
    spec: CacheSpec = flax.struct.field(pytree_node=False)

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    @property
    def dropped(self) -> jax.Array:
        """int32 [B], tokens n that each windowed head has folded away."""
        return dropped(self.spec, self.length, self.window)


def init(spec: CacheSpec, batch: int, prompt_lengths: jax.Array | np.ndarray | None = None) -> KVCache:
    """An empty cache. `prompt_lengths` int32 [B] fixes each row's window; None leaves it to the first extend."""
    # Compiled, or one device would allocate what all are to share.
    return (_init if spec.mesh is None else _init_on_mesh)(spec, batch, prompt_lengths)


def _init(spec: CacheSpec, batch: int, prompt_lengths: jax.Array | np.ndarray | None) -> KVCache:
    def group(heads: int, windowed: bool, scope: int) -> Group:
        slots, kind = spec.slots(windowed, scope), spec.type(windowed)

        # Zeros, not empty: memory never written must not hold NaN (0 × NaN is NaN).
        def pair(*shape, dtype):
            return jnp.zeros((batch, heads, *shape), dtype), jnp.zeros((batch, heads, *shape), dtype)

        k, v = pair(slots, spec.head_dim, dtype=kind)
        k_scale, v_scale = pair(1, slots, dtype=jnp.float32) if kind == INT8 else (None, None)
        means = spec.compensated(windowed, scope)
        k_mean, v_mean = pair(spec.shards, spec.head_dim, dtype=jnp.float32) if means else (None, None)
        return Group(k, v, k_mean, v_mean, windowed, k_scale, v_scale, scope)

    # Buffers of their own: a cache is donated, and no buffer can be given away twice.
    length, window = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
    if spec.razor is None:
        window = window + spec.capacity
    elif prompt_lengths is not None:
        # A prompt past the capacity cannot be held, so its share must not pass the ring that is allocated.
        prompt = jnp.minimum(jnp.asarray(prompt_lengths, jnp.int32), spec.capacity)
        window = ring_length(spec.razor, prompt)
    layers = tuple(tuple(group(*g) for g in spec.groups(layer)) for layer in range(len(spec.counts)))
    return placed(KVCache(layers, length, window, jnp.zeros((batch,), bool), spec))


_init_on_mesh = jax.jit(_init, static_argnums=(0, 1))


def places(tree: Any, spec: CacheSpec, batch: int) -> list[PartitionSpec]:
    """The PartitionSpec of each leaf of a cache on a mesh, or of a part of one; leaves may be shapes.

    What a row has seen is known everywhere.
    """
    rows = spec.rows(batch)
    slots, scales = PartitionSpec(rows, None, MODEL), PartitionSpec(rows, None, None, MODEL)
    by_slot = {"k": slots, "v": slots, "k_mean": slots, "v_mean": slots, "k_scale": scales, "v_scale": scales}
    by_head = dict.fromkeys(by_slot, PartitionSpec(rows, MODEL))
    names = by_head if spec.layout == "head" else by_slot
    paths = (path[-1].name for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0])
    return [names.get(name, PartitionSpec()) for name in paths]


def shardings(cache: KVCache) -> KVCache:
    """The NamedSharding of each leaf of a cache on a mesh, arrays or their shapes, as a cache."""
    mesh = cache.spec.mesh
    assert mesh is not None, "a cache on one device has no mesh to lie on"
    where = [NamedSharding(mesh, place) for place in places(cache, cache.spec, cache.batch)]
    return jax.tree.unflatten(jax.tree.structure(cache), where)


def placed(cache: KVCache) -> KVCache:
    """The cache, laid out as `shardings` says; as it is without a mesh."""
    mesh = cache.spec.mesh
    if mesh is None:
        return cache
    leaves, tree = jax.tree.flatten(cache)
    where = (NamedSharding(mesh, place) for place in places(cache, cache.spec, cache.batch))
    return jax.tree.unflatten(tree, [lax.with_sharding_constraint(x, at) for x, at in zip(leaves, where, strict=True)])


class Call(flax.struct.PyTreeNode):
    """What one call adds, the same for every layer.

    Attributes:
      length: int32 [B], tokens before the call.
      new: int32 [B], valid tokens of the call; 0 leaves a row bit-identical.
      window: int32 [B], W.
      fresh: every row is known to be empty, so there is no cache to attend to.
    """

    length: jax.Array
    new: jax.Array
    window: jax.Array
    spec: CacheSpec = flax.struct.field(pytree_node=False)
    fresh: bool = flax.struct.field(pytree_node=False, default=False)

    def ring(self, group: Group) -> tuple[jax.Array | None, int]:
        """W int32 [B], None where everything is kept, and N0."""
        if group.scope:
            return jnp.full_like(self.window, group.scope), 0
        return (self.window if group.windowed else None), self.spec.sinks

    def valid(self, group: Group) -> jax.Array:
        """int32 [B], valid slots before the call."""
        window, sinks = self.ring(group)
        return self.length if window is None else jnp.minimum(self.length, sinks + window)

    @property
    def dropped(self) -> jax.Array:
        """int32 [B], tokens dropped before the call."""
        return dropped(self.spec, self.length, self.window)


def begin(
    cache: KVCache, lengths: Int[jax.Array | np.ndarray, " B"], T: int, fresh: bool = False
) -> tuple[Call, KVCache]:
    """Settle windows and overflow for a call of `lengths` int32 [B] valid tokens out of T.

    A row that would overflow gets no tokens and its flag; the cache comes back with its new lengths.
    """
    spec = cache.spec
    asked = jnp.clip(lengths.astype(jnp.int32), 0, T)
    fits = cache.length + asked <= spec.capacity
    new = jnp.where(fits, asked, 0)
    window = cache.window
    if spec.razor is not None:
        # A row's first tokens are its prompt.
        window = jnp.where((window == 0) & (new > 0), ring_length(spec.razor, new), window)
    call = Call(cache.length, new, window, spec, fresh)
    return call, cache.replace(length=cache.length + new, window=window, overflow=cache.overflow | ~fits)


def write(
    layer: tuple[Group, ...], k: Float[jax.Array, "B K T H"], v: Float[jax.Array, "B K T H"], call: Call
) -> tuple[Group, ...]:
    """Write a call's k, v [B, K, T, H], heads in held order: evict, fold into the means, store.

    On a mesh this runs on one device's share, inside `shard_map`, and k and v are what `bring` gave.
    """
    if call.spec.shards > 1:
        return _write_slots(layer, k, v, call)
    groups, first = [], 0
    for group in layer:
        heads = slice(first, first + group.k.shape[1])
        first = heads.stop
        groups.append(_write_group(group, k[:, heads], v[:, heads], call.length, call.new, *call.ring(group), call))
    return tuple(groups)


def _write_group(group: Group, k, v, length, new, window, sinks, call: Call) -> Group:
    (new_k, k_scale), (new_v, v_scale) = (quantize(x, group.k.dtype) for x in (k, v))
    tokens = GroupArrays(new_k, new_v, k_scale, v_scale)
    held = cache_write.write(group.stored, tokens, length, new, window, sinks, implementation=call.spec.kernels)
    return group.replace(**held._asdict())


def _write_slots(layer: tuple[Group, ...], k, v, call: Call) -> tuple[Group, ...]:
    """`write` on one device of a cache by slot: tokens [B, K, T', H] of all heads, those that come to its slots."""
    here, groups = Shard(call.spec.shards, lax.axis_index(MODEL)), []
    for group, heads in zip(layer, call.spec.held([group.k.shape[1] for group in layer]), strict=True):
        ring = call.ring(group)
        length, end = (here.length(x, *ring) for x in (call.length, call.length + call.new))
        new_k, new_v = (pick(x, heads) for x in (k, v))
        groups.append(_write_group(group, new_k, new_v, length, end - length, *here.ring(*ring), call))
    return tuple(groups)


def bring(
    layer: tuple[Group, ...], k: Float[jax.Array, "B K T H"], v: Float[jax.Array, "B K T H"], call: Call
) -> tuple[jax.Array, jax.Array]:
    """A call's k, v [B, K, T, H] as this device is to `write` them.

    By slot a device has every token of its own heads, and needs, of every head, the tokens that come to its slots.
    Devices that differ by their heads trade the one for the other.
    """
    spec, mesh, T = call.spec, call.spec.mesh, k.shape[2]
    if spec.shards == 1:
        return k, v
    assert mesh is not None
    if T == 1:
        return lax.all_gather(k, HEADS, axis=1, tiled=True), lax.all_gather(v, HEADS, axis=1, tiled=True)
    peers = jnp.arange(mesh.shape[HEADS], dtype=jnp.int32) * mesh.shape[ROWS] + lax.axis_index(ROWS)
    there = Shard(spec.shards, peers[:, None])
    most = max(most_tokens(T, spec.shards, spec.shortest_ring(g.scope) if g.windowed else None) for g in layer)
    # int32 [groups, heads, B, T'], and of each head of this device which group's it is
    wanted = jnp.stack([there.tokens(call.length, *call.ring(group), most) for group in layer])
    group_of = np.zeros((spec.num_kv_heads,), np.int32)
    for index, heads in enumerate(spec.held([group.k.shape[1] for group in layer])):
        group_of[heads] = index
    mine = lax.dynamic_slice_in_dim(jnp.asarray(group_of), lax.axis_index(HEADS) * k.shape[1], k.shape[1])
    index = jnp.clip(wanted[mine], 0, T - 1).transpose(1, 2, 0, 3)[..., None]  # [heads, B, k, T', 1]

    def trade(x):
        parts = jnp.take_along_axis(x[None], index, axis=3)
        return lax.all_to_all(parts, HEADS, split_axis=0, concat_axis=2, tiled=True)[0]

    return trade(k), trade(v)


def pick(x: jax.Array, heads: np.ndarray) -> jax.Array:
    """KV heads of x [B, K, …]; mostly a slice."""
    first, last = int(heads[0]), int(heads[-1])
    if np.array_equal(heads, np.arange(first, last + 1)):
        return x[:, first : last + 1]
    return x[:, heads]


def dropped(spec: CacheSpec, length: Any, window: Any) -> Any:
    """n = max(0, length - N0 - W), int32 [B], as jax or NumPy arrays go in; by the shortest scope if there are any."""
    if spec.razor is None:
        return length * 0
    if spec.scopes:
        shortest = min((scope for layer in spec.scopes for scope in layer if scope), default=spec.capacity)
        return (length - shortest).clip(0)
    # A window of 0 is one not yet set: nothing was seen, so nothing dropped.
    return ((length - spec.sinks - window) * (window > 0)).clip(0)


def broadcast(cache: KVCache, batch: int, capacity: int) -> KVCache:
    """A one-row cache repeated over `batch` rows, or one of that batch, with room for `capacity` tokens.

    The argument is left as it is: compress once, ask many times.
    """
    spec = dataclasses.replace(cache.spec, capacity=max(capacity, cache.spec.capacity))

    def rows(x):
        return jnp.broadcast_to(x, (batch, *x.shape[1:]))

    def grow(group: Group) -> Group:
        extra = (spec.slots(group.windowed, group.scope) - group.k.shape[2]) // spec.shards

        def shares(x, axis):
            # By slot every device's share grows.
            shape = (*x.shape[:axis], spec.shards, x.shape[axis] // spec.shards, *x.shape[axis + 1 :])
            grown = jnp.pad(x.reshape(shape), [(0, extra if i == axis + 1 else 0) for i in range(5)])
            return grown.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

        if spec.shards > 1:
            return group.with_slots(shares)
        return group.with_slots(lambda x, axis: jnp.pad(x, [(0, extra if i == axis else 0) for i in range(4)]))

    layers = tuple(tuple(grow(g) for g in layer) for layer in cache.layers)
    return placed(jax.tree.map(rows, cache.replace(layers=layers, spec=spec)))


def rollback(cache: KVCache, saved: KVCache) -> KVCache:
    """The state `saved`, which needs only its windowed groups, lengths and flags to be intact.

    Folding cannot be undone, but a full group only ever gains slots, which a shorter length hides.
    """
    layers = tuple(
        tuple(old if old.windowed else new for new, old in zip(layer, kept, strict=True))
        for layer, kept in zip(cache.layers, saved.layers, strict=True)
    )
    return saved.replace(layers=layers)


def positions(group: Group, call: Call, here: Shard | None = None) -> jax.Array:
    """int32 [B, S], the position that each slot of a group without sinks held before the call; of a slot that was
    not written, anything. `here`: of the slots that lie there."""
    slots = jnp.arange(group.k.shape[2], dtype=jnp.int32)
    if here is not None:
        slots = here.index + here.devices * slots
    if not group.windowed:
        return jnp.broadcast_to(slots, (call.length.shape[0], slots.shape[0]))
    turns = (call.length[:, None] - 1 - slots) // group.scope
    return slots + group.scope * turns


def deleted(cache: KVCache) -> bool:
    """Whether the cache was donated to a call, so that its memory is no longer its own."""
    return cache.length.is_deleted()


def allocated_bytes(cache: KVCache) -> int:
    """Bytes of the cache's key, value and mean arrays, read off the arrays themselves; on a mesh of all devices, each
    row counted where it lies over `data`."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))


def device_bytes(cache: KVCache) -> int:
    """Of these bytes, those on each device; the same on all of them."""
    leaves = jax.tree.leaves(cache.layers)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)
