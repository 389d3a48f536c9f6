"""The KV cache: a static-shape pytree split into head groups, and the pure operations on it.

A *full* group keeps every token of its KV heads, position p in slot p. A *windowed* group keeps N0 sinks, a
ring of the W newest other tokens and, in float32, the means of all it dropped:

    slots   | sinks 0 … N0-1 | ring N0 … N0+W-1 |      position p ≥ N0 lives in slot N0 + (p - N0) mod W
    means   k_mean, v_mean over the n = max(0, length - N0 - W) dropped tokens

A group of an ALiBi model has a *scope*, the ring's length for every row, and no sinks and no means.

n is derived, never stored, and a row's valid slots are always a prefix. Letters as in `models.transformer`,
and S cache slots. W is each row's own (`KVCache.window`), inside the static allocation.
"""

from __future__ import annotations

import collections
import dataclasses
import warnings
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from .config import HeadSplit, RazorConfig, kv_type
from .kernels import attention, cache_write
from .kernels.backend import Implementation, choose, first_choice, obstacle
from .kernels.cache_write import Stored
from .kernels.ordering import after as _after
from .kernels.quantize import INT8, quantize

# Slots that a kernel reads are whole tiles: on TPU of the smallest type, or the cache is copied each step.
_TILE = {"pallas_tpu": 32, "mosaic_gpu": 8}


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """All that is static about a cache: what jit compiles for."""

    capacity: int  # tokens a row can hold
    head_dim: int  # H
    retrieval: tuple[tuple[int, ...], ...]  # of the split: which KV heads keep everything, held first
    num_kv_heads: int  # K
    dtype: str
    razor: RazorConfig | None  # None: dense, every head in one full group
    windowed_dtype: str = ""  # of the windowed heads, "" for `dtype`
    implementation: Implementation = "xla"  # of attention and writes
    forced: bool = False  # asked for by name
    scopes: tuple[tuple[int, ...], ...] = ()  # of the split: how many tokens each KV head of an ALiBi model keeps

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
        """Slots that a windowed head may use."""
        if self.razor is None:
            return self.capacity
        return min(self.capacity, self.sinks + ring_length(self.razor, self.capacity))

    def slots(self, windowed: bool, scope: int = 0) -> int:
        """Slots allocated for a head: those it may use, rounded up to whole tiles where a kernel wants them."""
        slots = self.windowed_slots if windowed else self.capacity
        if scope:
            slots = min(self.capacity, scope)
        tile = _TILE.get(self.implementation, 1)
        return -(-slots // tile) * tile

    def type(self, windowed: bool) -> jnp.dtype:
        """The type of a head's keys and values."""
        return jnp.dtype(self.windowed_dtype or self.dtype) if windowed else jnp.dtype(self.dtype)

    @property
    def kernels(self) -> Implementation | None:
        """What calls ask for: kernels that nobody forced leave a call that they cannot take to XLA."""
        return self.implementation if self.forced or self.implementation == "xla" else None

    def groups(self, layer: int) -> tuple[tuple[int, bool, int], ...]:
        """(KV heads, windowed, scope or 0) of each of the layer's groups, in the order in which heads are held."""
        if self.razor is None:
            return ((self.num_kv_heads, False, 0),)
        kept = self.counts[layer]
        rest = ((self.num_kv_heads - kept, True, 0),)
        if self.scopes:
            heads = collections.Counter(scope for scope in self.scopes[layer] if scope)
            rest = tuple((heads[scope], True, scope) for scope in sorted(heads, reverse=True))
        return tuple(group for group in ((kept, False, 0), *rest) if group[0])

    def compensated(self, windowed: bool, scope: int) -> bool:
        """Whether such a group has means."""
        return windowed and not scope and self.razor is not None and self.razor.compensation

    def describe(self) -> str:
        """The policy in one line, for reports."""
        if self.razor is None:
            return "dense"
        if not self.scopes:
            return self.razor.describe()
        kept = [scope for layer in self.scopes for scope in layer if scope]
        return f"ALiBi scopes of {min(kept):,} to {max(kept):,} tokens" if kept else "no ALiBi head is cut"

    def kv_bytes(self, batch: int) -> int:
        """Bytes of all groups, as `init` allocates them."""
        total = 0
        for layer in range(len(self.counts)):
            for heads, windowed, scope in self.groups(layer):
                kind = self.type(windowed)
                token = self.head_dim * kind.itemsize + (4 if kind == INT8 else 0)
                means = 4 * self.head_dim if self.compensated(windowed, scope) else 0
                total += heads * 2 * (self.slots(windowed, scope) * token + means)
        return batch * total

    def dense_bytes(self, batch: int) -> int:
        """Bytes of a bfloat16 dense cache of the same capacity and batch, the denominator of every ratio."""
        return batch * len(self.counts) * self.num_kv_heads * self.capacity * 2 * self.head_dim * 2


class Group(flax.struct.PyTreeNode):
    """KV heads of one layer that keep the same things.

    Attributes:
      k, v: [B, K_group, S, H].
      k_mean, v_mean: float32 [B, K_group, 1, H], or None without a compensation token.
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
    def stored(self) -> Stored:
        """The arrays, as the kernels take them."""
        return Stored(self.k, self.v, self.k_scale, self.v_scale, self.k_mean, self.v_mean)

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


def ring_length(razor: RazorConfig, tokens: Any) -> Any:
    """W for a prompt of that many tokens (an int or an int32 array): fixed, or max(4000, tokens / 5)."""
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
) -> CacheSpec:
    """The spec of a cache for a model of that split, head width and weight type, which is the cache's too where
    razor names none; `alibi` where attention adds biases.

    `implementation` None chooses by the device; where no kernel takes the model's shapes or types the XLA path runs
    and a warning says so. Raises ValueError where a forced one cannot run.
    """
    if capacity < 1:
        raise ValueError(f"capacity={capacity}: a cache holds at least 1 token")
    full = windowed = jnp.dtype(dtype)
    if razor is not None:
        full = kv_type(razor.kv_dtype) if razor.kv_dtype else full
        windowed = kv_type(razor.windowed_kv_dtype) if razor.windowed_kv_dtype else full
    return CacheSpec(
        capacity,
        head_dim,
        split.retrieval,
        split.num_kv_heads,
        full.name,
        razor,
        windowed_dtype="" if windowed == full else windowed.name,
        implementation=_choose(implementation, head_dim, jnp.dtype(dtype), {full, windowed}, alibi),
        forced=implementation is not None,
        scopes=split.scopes,
    )


def _choose(
    asked: Implementation | None, H: int, dtype: jnp.dtype, cached: set[jnp.dtype], alibi: bool
) -> Implementation:
    """The implementation that runs for queries and new tokens of `dtype` and caches of the types `cached`."""

    def of(kind) -> Any:
        return jax.ShapeDtypeStruct((1, 1, 32, H), kind)

    def unsupported(name):
        for kind in sorted(cached | {dtype}, key=str):
            keys = of(kind)
            reason = attention.unsupported(name, of(dtype), keys, keys, alibi) or cache_write.unsupported(
                name, Stored(keys, keys)
            )
            if reason is not None:
                return reason
        return None

    chosen = choose(asked, unsupported)
    if asked is None and chosen != first_choice():
        # Python shows a warning from one place once.
        reason = obstacle(first_choice(), unsupported)
        warnings.warn(f"attention runs without its {first_choice()} kernels, on XLA: {reason}", stacklevel=3)
    return chosen


def init(spec: CacheSpec, batch: int, prompt_lengths: jax.Array | np.ndarray | None = None) -> KVCache:
    """An empty cache. `prompt_lengths` int32 [B] fixes each row's window; None leaves it to the first extend."""

    def group(heads: int, windowed: bool, scope: int) -> Group:
        slots, kind = spec.slots(windowed, scope), spec.type(windowed)

        # Zeros, not empty: memory never written must not hold NaN (0 × NaN is NaN).
        def pair(*shape, dtype):
            return jnp.zeros((batch, heads, *shape), dtype), jnp.zeros((batch, heads, *shape), dtype)

        k, v = pair(slots, spec.head_dim, dtype=kind)
        k_scale, v_scale = pair(1, slots, dtype=jnp.float32) if kind == INT8 else (None, None)
        means = spec.compensated(windowed, scope)
        k_mean, v_mean = pair(1, spec.head_dim, dtype=jnp.float32) if means else (None, None)
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
    """Write a call's k, v [B, K, T, H], heads in held order: evict, fold into the means, store."""
    groups, first = [], 0
    for group in layer:
        heads = slice(first, first + group.k.shape[1])
        first = heads.stop
        (new_k, k_scale), (new_v, v_scale) = (quantize(x[:, heads], group.k.dtype) for x in (k, v))
        held = cache_write.write(
            group.stored,
            Stored(new_k, new_v, k_scale, v_scale),
            call.length,
            call.new,
            *call.ring(group),
            implementation=call.spec.kernels,
        )
        groups.append(group.replace(**held._asdict()))
    return tuple(groups)


def after(x: jax.Array, earlier: jax.Array, call: Call) -> jax.Array:
    """x, but not before `earlier` is there: `kernels.ordering`."""
    return _after(x, earlier, call.length)


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
        extra = spec.slots(group.windowed, group.scope) - group.k.shape[2]
        return group.with_slots(lambda x, axis: jnp.pad(x, [(0, extra if i == axis else 0) for i in range(4)]))

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


def positions(group: Group, call: Call) -> jax.Array:
    """int32 [B, S], the position that each slot of a group without sinks held before the call; of a slot that was
    not written, anything."""
    slots = jnp.arange(group.k.shape[2], dtype=jnp.int32)
    if not group.windowed:
        return jnp.broadcast_to(slots, (call.length.shape[0], slots.shape[0]))
    turns = (call.length[:, None] - 1 - slots) // group.scope
    return slots + group.scope * turns


def deleted(cache: KVCache) -> bool:
    """Whether the cache was donated to a call, so that its memory is no longer its own."""
    return cache.length.is_deleted()


def allocated_bytes(cache: KVCache) -> int:
    """Bytes of the cache's key, value and mean arrays, read off the arrays themselves."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
