"""The KV cache: a static-shape pytree split into head groups, and the pure operations on it.

A *full* group keeps every token of its KV heads, position p in slot p. A *windowed* group keeps N0 sinks, a
ring of the W newest other tokens and, in float32, the means of all it dropped:

    slots   | sinks 0 … N0-1 | ring N0 … N0+W-1 |      position p ≥ N0 lives in slot N0 + (p - N0) mod W
    means   k_mean, v_mean over the n = max(0, length - N0 - W) dropped tokens

n is derived, never stored, and a row's valid slots are always a prefix. Letters as in `models.transformer`,
and S cache slots. W is each row's own (`KVCache.window`), inside the static allocation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from .config import HeadSplit, RazorConfig


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """All that is static about a cache: what jit compiles for."""

    capacity: int  # tokens a row can hold
    head_dim: int  # H
    retrieval: tuple[tuple[int, ...], ...]  # of the split: which KV heads keep everything, held first
    num_kv_heads: int  # K
    dtype: str
    razor: RazorConfig | None  # None: dense, every head in one full group

    @property
    def counts(self) -> tuple[int, ...]:
        """Retrieval KV heads of each layer."""
        return tuple(len(heads) for heads in self.retrieval)

    @property
    def sinks(self) -> int:
        """N0."""
        return self.razor.sinks if self.razor else 0

    @property
    def windowed_slots(self) -> int:
        """Slots allocated for a windowed head."""
        if self.razor is None:
            return self.capacity
        return min(self.capacity, self.sinks + ring_length(self.razor, self.capacity))

    def groups(self, layer: int) -> tuple[tuple[int, bool], ...]:
        """(KV heads, windowed) of each of the layer's groups, in the order in which heads are held."""
        if self.razor is None:
            return ((self.num_kv_heads, False),)
        kept = self.counts[layer]
        both = ((kept, False), (self.num_kv_heads - kept, True))
        return tuple(group for group in both if group[0])

    def kv_bytes(self, batch: int) -> int:
        """Bytes of all groups, as `init` allocates them."""
        slots, token = 0, 2 * self.head_dim
        means = 0
        for layer in range(len(self.counts)):
            for heads, windowed in self.groups(layer):
                slots += heads * (self.windowed_slots if windowed else self.capacity)
                means += heads if windowed and self.razor and self.razor.compensation else 0
        return batch * token * (slots * jnp.dtype(self.dtype).itemsize + means * 4)

    def dense_bytes(self, batch: int) -> int:
        """Bytes of a bfloat16 dense cache of the same capacity and batch, the denominator of every ratio."""
        return batch * len(self.counts) * self.num_kv_heads * self.capacity * 2 * self.head_dim * 2


class Group(flax.struct.PyTreeNode):
    """KV heads of one layer that keep the same things.

    Attributes:
      k, v: [B, K_group, S, H].
      k_mean, v_mean: float32 [B, K_group, 1, H], or None without a compensation token.
      windowed: sinks and a ring, or every token.
    """

    k: jax.Array
    v: jax.Array
    k_mean: jax.Array | None
    v_mean: jax.Array | None
    windowed: bool = flax.struct.field(pytree_node=False)


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


def ring_length(razor: RazorConfig, tokens: Any) -> Any:
    """W for a prompt of that many tokens (an int or an int32 array): fixed, or max(4000, tokens / 5)."""
    if razor.window is not None:
        return tokens * 0 + razor.window
    larger = max if isinstance(tokens, int) else jnp.maximum
    return larger(tokens // razor.window_divisor, razor.min_window)


def make_spec(split: HeadSplit, head_dim: int, capacity: int, razor: RazorConfig | None, dtype: Any) -> CacheSpec:
    """The spec of a cache for a model of that split and head width; `dtype` where razor names none."""
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: a cache holds at least 1 token")
    kv_dtype = razor.kv_dtype if razor is not None and razor.kv_dtype else dtype
    return CacheSpec(capacity, head_dim, split.retrieval, split.num_kv_heads, jnp.dtype(kv_dtype).name, razor)


def init(spec: CacheSpec, batch: int, prompt_lengths: jax.Array | np.ndarray | None = None) -> KVCache:
    """An empty cache. `prompt_lengths` int32 [B] fixes each row's window; None leaves it to the first extend."""

    def group(heads: int, windowed: bool) -> Group:
        slots = spec.windowed_slots if windowed else spec.capacity
        shape = (batch, heads, slots, spec.head_dim)
        # Zeros, not empty: memory never written must not hold NaN (0 × NaN is NaN).
        k, v = jnp.zeros(shape, spec.dtype), jnp.zeros(shape, spec.dtype)
        if not (windowed and spec.razor and spec.razor.compensation):
            return Group(k, v, None, None, windowed)
        mean = (batch, heads, 1, spec.head_dim)
        return Group(k, v, jnp.zeros(mean, jnp.float32), jnp.zeros(mean, jnp.float32), windowed)

    # Buffers of their own: a cache is donated, and no buffer can be given away twice.
    length, window = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch,), jnp.int32)
    if spec.razor is None:
        window = window + spec.capacity
    elif prompt_lengths is not None:
        # A prompt past the capacity cannot be held, so its share must not pass the ring that is allocated.
        prompt = jnp.minimum(jnp.asarray(prompt_lengths, jnp.int32), spec.capacity)
        window = ring_length(spec.razor, prompt)
    layers = tuple(tuple(group(*g) for g in spec.groups(layer)) for layer in range(len(spec.counts)))
    return KVCache(layers, length, window, jnp.zeros((batch,), bool), spec)


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

    def valid(self, windowed: bool) -> jax.Array:
        """int32 [B], valid slots before the call."""
        return jnp.minimum(self.length, self.spec.sinks + self.window) if windowed else self.length

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
    """Write a call's k, v [B, K, T, H], heads in held order: evict, fold into the means, store."""
    groups, first = [], 0
    for group in layer:
        heads = slice(first, first + group.k.shape[1])
        first = heads.stop
        store = _write_full
        if group.windowed:
            store = _write_ring_token if k.shape[2] == 1 else _write_ring_chunk
        groups.append(store(group, k[:, heads].astype(group.k.dtype), v[:, heads].astype(group.v.dtype), call))
    return tuple(groups)


def _write_full(group: Group, k: jax.Array, v: jax.Array, call: Call) -> Group:
    tokens = jnp.arange(k.shape[2], dtype=jnp.int32)
    # Invalid tokens aim past the end, each at a slot of its own, and are dropped.
    slots = jnp.where(tokens < call.new[:, None], call.length[:, None], group.k.shape[2]) + tokens
    return group.replace(k=_scatter(group.k, slots, k), v=_scatter(group.v, slots, v))


def _write_ring_token(group: Group, k: jax.Array, v: jax.Array, call: Call) -> Group:
    """One token a row: one slot read, folded, overwritten."""
    sinks, position = call.spec.sinks, call.length
    slot = jnp.where(position < sinks, position, sinks + (position - sinks) % jnp.maximum(call.window, 1))
    n = call.dropped
    folds = (call.new > 0) & (position >= sinks + call.window)

    def evicted(slots):
        at = jnp.minimum(slot, slots.shape[2] - 1)[:, None, None, None]
        return jnp.take_along_axis(slots, at, axis=2)

    def fold(mean, old):
        before = jnp.where((n > 0)[:, None, None, None], mean, 0.0)
        new = before + (old.astype(jnp.float32) - before) / (n + 1).astype(jnp.float32)[:, None, None, None]
        return jnp.where(folds[:, None, None, None], new, mean)

    if group.k_mean is not None:
        k_mean, v_mean = fold(group.k_mean, evicted(group.k)), fold(group.v_mean, evicted(group.v))
        k, v = after(k, k_mean, call), after(v, v_mean, call)
        group = group.replace(k_mean=k_mean, v_mean=v_mean)
    target = jnp.where(call.new > 0, slot, group.k.shape[2])[:, None]
    return group.replace(k=_scatter(group.k, target, k), v=_scatter(group.v, target, v))


def _write_ring_chunk(group: Group, k: jax.Array, v: jax.Array, call: Call) -> Group:
    """T tokens a row: each slot gathers its newest position, so no slot is written twice."""
    sinks = call.spec.sinks
    window = jnp.maximum(call.window, 1)[:, None]
    length, end = call.length[:, None], (call.length + call.new)[:, None]
    slots = jnp.arange(group.k.shape[2], dtype=jnp.int32)[None, :]
    held = slots < sinks + window

    def newest(length):
        """Position that each slot holds once `length` tokens were seen; below 0 where it is empty."""
        laps = jnp.where(slots < sinks, 0, (length - 1 - slots) // window)
        return jnp.where(held & (slots < length), slots + laps * window, -1)

    source = newest(end) - length
    arrives = (source >= 0) & (call.new > 0)[:, None]
    tokens = jnp.arange(k.shape[2], dtype=jnp.int32)[None, :]
    n_before, n_after = call.dropped, dropped(call.spec, call.length + call.new, call.window)
    first_kept = (sinks + n_after)[:, None]
    old = newest(length)
    leaves_ring = (old >= sinks) & (old < first_kept)
    position = length + tokens
    leaves_chunk = (tokens < call.new[:, None]) & (position >= sinks) & (position < first_kept)

    def fold(mean, ring, chunk):
        total = _masked_sum(ring, leaves_ring) + _masked_sum(chunk, leaves_chunk)
        count = jnp.maximum(n_after, 1).astype(jnp.float32)
        before = jnp.where((n_before > 0)[:, None, None, None], mean, 0.0)
        after = before * (n_before / count)[:, None, None, None] + total / count[:, None, None, None]
        return jnp.where((n_after > n_before)[:, None, None, None], after, mean)

    def gather(ring, chunk):
        index = jnp.clip(source, 0, chunk.shape[2] - 1)[:, None, :, None]
        return jnp.where(arrives[:, None, :, None], jnp.take_along_axis(chunk, index, axis=2), ring)

    if group.k_mean is not None:
        group = group.replace(k_mean=fold(group.k_mean, group.k, k), v_mean=fold(group.v_mean, group.v, v))
    return group.replace(k=gather(group.k, k), v=gather(group.v, v))


def after(x: jax.Array, earlier: jax.Array, call: Call) -> jax.Array:
    """x, but not before `earlier` is there.

    Reading a cache and writing it are independent until someone says otherwise, and a compiler that may
    write first keeps a copy to read from. An optimization barrier says it on TPU and GPU; XLA on CPU drops
    barriers, so one element of x is also chosen by a condition that always holds but that no compiler knows.
    """
    x, earlier = lax.optimization_barrier((x, earlier))
    corner = (0,) * x.ndim
    chosen = jnp.where(call.length[0] >= 0, x[corner], earlier[(0,) * earlier.ndim].astype(x.dtype))
    return x.at[corner].set(chosen)


def _scatter(cache: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """cache [B,K,S,H] with rows [B,K,T,H] at slots [B,T], distinct in a row; slots past S are dropped."""
    batch = jnp.arange(cache.shape[0], dtype=jnp.int32)[:, None]
    return cache.at[batch, :, slots].set(rows.transpose(0, 2, 1, 3), mode="drop", unique_indices=True)


def _masked_sum(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Float32 [B,K,1,H] sum of x [B,K,s,H] over mask [B,s]; NaN outside the mask stays outside."""
    return jnp.sum(jnp.where(mask[:, None, :, None], x.astype(jnp.float32), 0.0), axis=2, keepdims=True)


def dropped(spec: CacheSpec, length: Any, window: Any) -> Any:
    """n = max(0, length - N0 - W), int32 [B], as jax or NumPy arrays go in."""
    if spec.razor is None:
        return length * 0
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
        extra = (spec.windowed_slots if group.windowed else spec.capacity) - group.k.shape[2]
        pad = ((0, 0), (0, 0), (0, extra), (0, 0))
        return group.replace(k=jnp.pad(group.k, pad), v=jnp.pad(group.v, pad))

    layers = tuple(tuple(grow(g) for g in layer) for layer in cache.layers)
    return jax.tree.map(rows, cache.replace(layers=layers, spec=spec))


def rollback(cache: KVCache, saved: KVCache) -> KVCache:
    """The state `saved`, which needs only its windowed groups, lengths and flags to be intact.

    Folding cannot be undone, but a full group only ever gains slots, which a shorter length hides.
    """
    layers = tuple(
        tuple(old if old.windowed else new for new, old in zip(layer, kept, strict=True))
        for layer, kept in zip(cache.layers, saved.layers, strict=True)
    )
    return saved.replace(layers=layers)


def deleted(cache: KVCache) -> bool:
    """Whether the cache was donated to a call, so that its memory is no longer its own."""
    return cache.length.is_deleted()


def allocated_bytes(cache: KVCache) -> int:
    """Bytes of the cache's key, value and mean arrays, read off the arrays themselves."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
