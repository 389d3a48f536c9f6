"""The KV cache: a static-shape pytree split into head groups, and the pure operations on it.

A *full* group keeps every token of its KV heads, position p in slot p. A *windowed* group keeps N0 sinks, a
ring of the W newest other tokens and, in float32, the means of all it dropped:

    slots   | sinks 0 … N0-1 | ring N0 … N0+W-1 |      position p ≥ N0 lives in slot N0 + (p - N0) mod W
    means   k_mean, v_mean over the n = max(0, length - N0 - W) dropped tokens

A group of an ALiBi model has a *scope*, the ring's length for every row, and no sinks and no means.

n is derived, never stored, and a row's valid slots are always a prefix. Letters as in `models.transformer`,
and S cache slots. W belongs to the row (`KVCache.window`) and fits the static allocation.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from . import proof
from .config import HeadGroup, HeadSplit, RazorConfig, kv_type
from .kernels import INT8, cache_write
from .kernels.backend import Implementation
from .kernels.cache_write import GroupArrays, quantize
from .kernels.choice import choose_for_model

if TYPE_CHECKING:
    from .mesh.placement import MeshPlacement
    from .methods.engine import Engine

# Slots that a kernel reads are whole tiles: on TPU of the smallest type, or the cache is copied each step.
_TILE = {"pallas_tpu": 32, "mosaic_gpu": 8}


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Static description of a cache (the jit key).

    Attributes:
      capacity: tokens that a row can hold.
      head_dim: H.
      heads: the head split.
      dtype: type of keys and values.
      razor: cache policy; None for dense attention, every head in one full group.
      windowed_dtype: type of the windowed heads, "" for `dtype`.
      implementation: of attention and cache writes.
      forced: whether the implementation was requested by name.
      placement: how the cache is spread over a mesh; None for one device.
      method: another cache method (`methods`), with `razor` None; None for Razor and dense attention.
    """

    capacity: int
    head_dim: int
    heads: HeadSplit
    dtype: str
    razor: RazorConfig | None
    windowed_dtype: str = ""
    implementation: Implementation = "xla"
    forced: bool = False
    placement: MeshPlacement | None = None
    method: Engine | None = None

    @property
    def sinks(self) -> int:
        """N0."""
        return self.razor.sinks if self.razor else 0

    @property
    def windowed_slots(self) -> int:
        """Slots that a windowed head may use."""
        if self.razor is None:
            return self.capacity
        return min(self.capacity, self.sinks + ring_length(self.razor, self.capacity))

    @property
    def shards(self) -> int:
        """Devices that share the slots of each head; 1 without a mesh."""
        return 1 if self.placement is None else self.placement.shards

    def slots(self, windowed: bool, scope: int = 0) -> int:
        """Return the slots allocated for a head: those it may use, rounded up to whole tiles on each device."""
        slots = self.windowed_slots if windowed else self.capacity
        if scope:
            slots = min(self.capacity, scope)
        tile = _TILE.get(self.implementation, 1) * self.shards
        return -(-slots // tile) * tile

    def type(self, windowed: bool) -> jnp.dtype:
        """Return the type of a head's keys and values."""
        return jnp.dtype(self.windowed_dtype or self.dtype) if windowed else jnp.dtype(self.dtype)

    @property
    def kernels(self) -> Implementation | None:
        """What attention and writes request: None lets a call that the kernels cannot take run on XLA."""
        return self.implementation if self.forced or self.implementation == "xla" else None

    def groups(self, layer: int) -> tuple[HeadGroup, ...]:
        """Return the layer's head groups in the order of the cache."""
        if self.razor is None:
            return (HeadGroup(self.heads.order(layer), windowed=False),)
        return self.heads.groups(layer)

    def shortest_ring(self, scope: int) -> int:
        """Return a length that no windowed head's ring goes below, in tokens."""
        if scope or self.razor is None:
            return scope or self.capacity
        return self.razor.window or self.razor.min_window

    def compensated(self, windowed: bool, scope: int) -> bool:
        """Return whether such a group has a compensation token."""
        return windowed and not scope and self.razor is not None and self.razor.compensation

    def describe(self) -> str:
        """Return the policy in one line, for reports."""
        if self.method is not None:
            return self.method.describe()
        if self.razor is None:
            return "dense"
        if not self.heads.scopes:
            return self.razor.describe()
        kept = [scope for layer in self.heads.scopes for scope in layer if scope]
        return f"ALiBi scopes of {min(kept):,} to {max(kept):,} tokens" if kept else "no ALiBi head is cut"

    def kv_bytes(self, batch: int) -> int:
        """Return the bytes of all groups as `init` allocates them."""
        if self.method is not None:
            return self.method.kv_bytes(self, batch)
        total = 0
        for layer in range(self.heads.num_layers):
            for heads, windowed, scope in self.groups(layer):
                kind = self.type(windowed)
                token = self.head_dim * kind.itemsize + (4 if kind == INT8 else 0)
                means = self.shards * 4 * self.head_dim if self.compensated(windowed, scope) else 0
                total += len(heads) * 2 * (self.slots(windowed, scope) * token + means)
        return batch * total

    def dense_bytes(self, batch: int) -> int:
        """Return the bytes of a bfloat16 dense cache of the same capacity and batch."""
        return batch * self.heads.num_layers * self.heads.num_kv_heads * self.capacity * 2 * self.head_dim * 2


def ring_length(razor: RazorConfig, tokens: Any) -> Any:
    """Return W for a prompt of that many tokens (an int or an int32 array): fixed, or max(4000, tokens / 5)."""
    if razor.window is not None:
        return tokens * 0 + razor.window
    larger = max if isinstance(tokens, int) else jnp.maximum
    return larger(tokens // razor.window_divisor, razor.min_window)


def make_spec(
    split: HeadSplit,
    head_dim: int,
    capacity: int,
    razor: RazorConfig | None,
    dtype: Any,
    implementation: Implementation | None = None,
    alibi: bool = False,
    placement: MeshPlacement | None = None,
) -> CacheSpec:
    """Return the spec of a cache; `functional.cache_spec` makes it from params and a policy.

    Args:
      dtype: of the weights, and of the cache where `razor` names no type.
      implementation: None chooses by the device; where no kernel takes the model's shapes or types, XLA runs and a
        warning says so.
      alibi: whether attention adds ALiBi biases.

    Raises:
      ValueError: a capacity below 1, or a forced implementation that cannot run.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: a cache holds at least 1 token")
    full = windowed = jnp.dtype(dtype)
    if razor is not None:
        full = kv_type(razor.kv_dtype) if razor.kv_dtype else full
        windowed = kv_type(razor.windowed_kv_dtype) if razor.windowed_kv_dtype else full
    with contextlib.nullcontext() if placement is None else placement.inside():
        chosen = choose_for_model(implementation, head_dim, jnp.dtype(dtype), {full, windowed}, alibi)
        if implementation is None and chosen != "xla":
            mesh = None if placement is None else placement.mesh
            proof.settle(proof.kinds_of(head_dim, dtype, {full, windowed}), chosen, mesh)
    return CacheSpec(
        capacity,
        head_dim,
        split,
        full.name,
        razor,
        windowed_dtype="" if windowed == full else windowed.name,
        implementation=chosen,
        forced=implementation is not None,
        placement=placement,
    )


class Group(flax.struct.PyTreeNode):
    """KV heads of one layer that keep the same things.

    Attributes:
      k, v: [B, K_group, S, H].
      k_mean, v_mean: float32 [B, K_group, 1, H], or None without a compensation token.
      windowed: keep sinks and a ring; False keeps every token.
      k_scale, v_scale: float32 [B, K_group, 1, S] of an int8 cache, or None.
      scope: tokens that a ring of an ALiBi model keeps, 0 for other models.
      table: int32 [B, pages] of a group in pages, None for others. With it k and v are pools [P, K_group, page, H] and
        scales [P, K_group, 1, page], as in `kernels.attention.Part`; means stay [B, …].
    """

    k: jax.Array
    v: jax.Array
    k_mean: jax.Array | None
    v_mean: jax.Array | None
    windowed: bool = flax.struct.field(pytree_node=False)
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    scope: int = flax.struct.field(pytree_node=False, default=0)
    table: jax.Array | None = None

    @property
    def arrays(self) -> GroupArrays:
        """The group's arrays in the kernels' record."""
        return GroupArrays(self.k, self.v, self.k_scale, self.v_scale, self.k_mean, self.v_mean)

    def map_slots(self, change: Callable[[jax.Array, int], jax.Array]) -> Group:
        """Return the group with `change(x, axis)` applied to every array that has slots, which are on `axis`."""
        k_scale, v_scale = (x if x is None else change(x, 3) for x in (self.k_scale, self.v_scale))
        return self.replace(k=change(self.k, 2), v=change(self.v, 2), k_scale=k_scale, v_scale=v_scale)


class KVCache(flax.struct.PyTreeNode):
    """The state of B sequences. Every leaf has a leading batch axis; everything else is static.

    Attributes:
      layers: the head groups (`Group`) of each layer, retrieval heads first; under another method, what it keeps.
      length: int32 [B], tokens that each row has seen.
      window: int32 [B], W of each row; 0 until the first `extend` sets it from its lengths.
      overflow: bool [B], rows that were asked to hold more than the capacity and were left untouched.
      seen: bool [B, V], tokens that each row has read, for the repetition penalty. None where nobody asked: `init`
        leaves it out, `text` adds it.
      fingerprint: uint32 [B, 2], of the weights that made the cache (`params.fingerprint_words`), None if unknown.
    """

    layers: tuple[tuple[Any, ...], ...]
    length: jax.Array
    window: jax.Array
    overflow: jax.Array
    spec: CacheSpec = flax.struct.field(pytree_node=False)
    seen: jax.Array | None = None
    fingerprint: jax.Array | None = None

    def __repr__(self) -> str:
        spec = self.spec
        return f"KVCache({self.batch} rows × {spec.capacity:,} tokens, {spec.dtype}, {spec.describe()})"

    @property
    def batch(self) -> int:
        return self.length.shape[0]

    @property
    def dropped(self) -> jax.Array:
        """n, int32 [B]: tokens that each windowed head has folded away."""
        return dropped(self.spec, self.length, self.window)


def init(spec: CacheSpec, batch: int, prompt_lengths: jax.Array | np.ndarray | None = None) -> KVCache:
    """Return an empty cache of `batch` rows.

    `prompt_lengths` int32 [B] fixes each row's window; None leaves it to the first `extend`.
    """

    def group(heads: tuple[int, ...], windowed: bool, scope: int) -> Group:
        slots, kind = spec.slots(windowed, scope), spec.type(windowed)

        # Zeros, not empty: memory never written must not hold NaN (0 × NaN is NaN).
        def pair(*shape, dtype):
            return jnp.zeros((batch, len(heads), *shape), dtype), jnp.zeros((batch, len(heads), *shape), dtype)

        k, v = pair(slots, spec.head_dim, dtype=kind)
        k_scale, v_scale = pair(1, slots, dtype=jnp.float32) if kind == INT8 else (None, None)
        means = spec.compensated(windowed, scope)
        k_mean, v_mean = pair(spec.shards, spec.head_dim, dtype=jnp.float32) if means else (None, None)
        return Group(k, v, k_mean, v_mean, windowed, k_scale, v_scale, scope)

    # Separate buffers: a cache is donated, and no buffer can be donated twice.
    length, window = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
    if spec.razor is None:
        window = window + spec.capacity
    elif prompt_lengths is not None:
        # A prompt longer than the capacity cannot be stored: its share must not exceed the allocated ring.
        prompt = jnp.minimum(jnp.asarray(prompt_lengths, jnp.int32), spec.capacity)
        window = ring_length(spec.razor, prompt)
    layers = tuple(tuple(group(*g) for g in spec.groups(layer)) for layer in range(spec.heads.num_layers))
    return KVCache(layers, length, window, jnp.zeros((batch,), bool), spec)


class AttentionMetadata(flax.struct.PyTreeNode):
    """What one call adds to each row; the same for every layer.

    Attributes:
      length: int32 [B], tokens before the call.
      new: int32 [B], valid tokens of the call; 0 leaves a row bit-identical.
      window: int32 [B], W.
      fresh: every row is known to be empty, so only the call's tokens are attended to.
    """

    length: jax.Array
    new: jax.Array
    window: jax.Array
    spec: CacheSpec = flax.struct.field(pytree_node=False)
    fresh: bool = flax.struct.field(pytree_node=False, default=False)

    def ring(self, group: Group) -> tuple[jax.Array | None, int]:
        """Return W int32 [B], None where everything is kept, and N0."""
        if group.scope:
            return jnp.full_like(self.window, group.scope), 0
        return (self.window if group.windowed else None), self.spec.sinks

    def valid(self, group: Group) -> jax.Array:
        """Return how many slots are valid before the call, int32 [B]."""
        window, sinks = self.ring(group)
        return self.length if window is None else jnp.minimum(self.length, sinks + window)

    @property
    def dropped(self) -> jax.Array:
        """n before the call, int32 [B]."""
        return dropped(self.spec, self.length, self.window)


def begin(
    cache: KVCache, lengths: Int[jax.Array | np.ndarray, " B"], T: int, fresh: bool = False
) -> tuple[AttentionMetadata, KVCache]:
    """Fix windows and overflow for a call of `lengths` int32 [B] valid tokens out of T.

    A row that would overflow gets no tokens and its flag. Returns the metadata and the cache with its new lengths.
    """
    spec = cache.spec
    asked = jnp.clip(lengths.astype(jnp.int32), 0, T)
    fits = cache.length + asked <= spec.capacity
    new = jnp.where(fits, asked, 0)
    window = cache.window
    if spec.razor is not None:
        # A row's first tokens are its prompt.
        window = jnp.where((window == 0) & (new > 0), ring_length(spec.razor, new), window)
    meta = AttentionMetadata(cache.length, new, window, spec, fresh)
    return meta, cache.replace(length=cache.length + new, window=window, overflow=cache.overflow | ~fits)


def mark_seen(cache: KVCache, tokens: Int[jax.Array | np.ndarray, "B T"], new: Int[jax.Array, " B"]) -> KVCache:
    """Add the first `new` int32 [B] of tokens int32 [B, T] to `seen`, if the cache has it."""
    if cache.seen is None:
        return cache
    (B, T), V = tokens.shape, cache.seen.shape[1]
    valid = jnp.arange(T, dtype=jnp.int32) < new[:, None]
    rows, at = jnp.arange(B, dtype=jnp.int32)[:, None], jnp.where(valid, tokens, V)
    return cache.replace(seen=cache.seen.at[rows, at].set(True, mode="drop"))


def write(
    layer: tuple[Group, ...], k: Float[jax.Array, "B K T H"], v: Float[jax.Array, "B K T H"], meta: AttentionMetadata
) -> tuple[Group, ...]:
    """Write a call's k, v [B, K, T, H], heads in the order of the groups: evict, fold into the means, store."""
    return tuple(
        write_group(group, k[:, heads], v[:, heads], meta.length, meta.new, *meta.ring(group), meta.spec)
        for group, heads in by_group(layer)
    )


def write_group(
    group: Group,
    k: jax.Array,
    v: jax.Array,
    length: jax.Array,
    new: jax.Array,
    window: jax.Array | None,
    sinks: jax.Array | int,
    spec: CacheSpec,
) -> Group:
    """Write `new` int32 [B] tokens k, v [B, K_group, T, H] to rows that have seen `length` tokens."""
    (new_k, k_scale), (new_v, v_scale) = (quantize(x, group.k.dtype) for x in (k, v))
    tokens = GroupArrays(new_k, new_v, k_scale, v_scale)
    arrays = cache_write.write(
        group.arrays, tokens, length, new, window, sinks, group.table, implementation=spec.kernels
    )
    return group.replace(**arrays._asdict())


def by_group(layer: tuple[Group, ...]) -> Iterator[tuple[Group, slice]]:
    """Yield each head group with its slice of the layer's KV heads."""
    first = 0
    for group in layer:
        yield group, slice(first, first + group.k.shape[1])
        first += group.k.shape[1]


def dropped(spec: CacheSpec, length: Any, window: Any) -> Any:
    """Return n = max(0, length - N0 - W), int32 [B]; with ALiBi by the shortest scope. Takes JAX or NumPy arrays."""
    if spec.method is not None:
        return spec.method.dropped(spec, length, window)
    if spec.razor is None:
        return length * 0
    if spec.heads.scopes:
        shortest = min((scope for layer in spec.heads.scopes for scope in layer if scope), default=spec.capacity)
        return (length - shortest).clip(0)
    # A window of 0 is not set yet: the row has seen nothing and dropped nothing.
    return ((length - spec.sinks - window) * (window > 0)).clip(0)


def broadcast(cache: KVCache, batch: int, capacity: int) -> KVCache:
    """Return a cache with room for `capacity` tokens, each row repeated so that there are `batch`, a multiple.

    The argument stays as it is: compress once, ask many times.
    """
    spec = dataclasses.replace(cache.spec, capacity=max(capacity, cache.spec.capacity))

    def grow(group: Group) -> Group:
        extra = spec.slots(group.windowed, group.scope) - group.k.shape[2]
        return group.map_slots(lambda x, axis: jnp.pad(x, [(0, extra if i == axis else 0) for i in range(4)]))

    return repeat_rows(cache, grow, batch, spec)


def repeat_rows(cache: KVCache, grow: Callable[[Group], Group], batch: int, spec: CacheSpec) -> KVCache:
    """Return the cache under `spec` with `grow` applied to every group and each row repeated, `batch` in all."""
    layers = tuple(tuple(grow(g) for g in layer) for layer in cache.layers)
    return jax.tree.map(lambda x: repeat(x, batch // cache.batch), cache.replace(layers=layers, spec=spec))


def repeat(x: jax.Array, times: int) -> jax.Array:
    """Return an array [B, …] with each row repeated, [B · times, …]."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], times, *x.shape[1:])).reshape(-1, *x.shape[1:])


def rollback(cache: KVCache, saved: KVCache) -> KVCache:
    """Return the state of `saved`; its full groups may have been donated.

    Windowed groups, lengths and flags are taken from `saved`, because folding cannot be undone. Full groups are taken
    from `cache`: they only gain slots, and the shorter length hides those.
    """
    layers = tuple(
        tuple(old if old.windowed else new for new, old in zip(layer, kept, strict=True))
        for layer, kept in zip(cache.layers, saved.layers, strict=True)
    )
    return saved.replace(layers=layers)


def positions(group: Group, meta: AttentionMetadata, slots: jax.Array | None = None) -> jax.Array:
    """Return the position that each slot of a group without sinks held before the call, int32 [B, S].

    Slots that were never written may get any position. `slots` int32 [S] are logical slots, None for 0 … S-1.
    """
    if slots is None:
        slots = jnp.arange(group.k.shape[2], dtype=jnp.int32)
    if not group.windowed:
        return jnp.broadcast_to(slots, (meta.length.shape[0], slots.shape[0]))
    turns = (meta.length[:, None] - 1 - slots) // group.scope
    return slots + group.scope * turns


def deleted(cache: KVCache) -> bool:
    """Return whether the cache was donated to a call, so that its memory, or that of some layers, is gone."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(cache))


def allocated_bytes(cache: KVCache) -> int:
    """Return the bytes of the cache's key, value, scale and mean arrays, read off the arrays, over all devices."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))


def device_bytes(cache: KVCache) -> int:
    """Return the bytes on each device, which are the same on all."""
    leaves = jax.tree.leaves(cache.layers)
    return sum(int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize for x in leaves)
