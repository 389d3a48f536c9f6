"""Cache writes in plain XLA: the reference of every kernel, and what runs where none does.

A full group holds position p in slot p. A windowed one holds `sinks` first tokens and a ring:

    position p < N0 in slot p, otherwise in slot N0 + (p - N0) mod W_b;   n = max(0, length - N0 - W_b) dropped
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int

from .. import FP8, INT8
from .arrays import GroupArrays


def write(
    held: GroupArrays,
    new: GroupArrays,
    lengths: Int[jax.Array, " B"],
    counts: Int[jax.Array, " B"],
    window: Int[jax.Array, " B"] | None,
    sinks: jax.Array | int = 0,
) -> GroupArrays:
    """Return the group with tokens 0 … counts[b]-1 of `new` appended to row b, which has seen lengths[b] tokens.

    Args:
      held: the group, [B,K,S,H].
      new: T tokens in the cache's type, [B,K,T,H] and scales [B,K,1,T]; no means.
      lengths, counts: int32 [B]; a row of count 0 stays bit-identical.
      window: int32 [B], W of each row; None for a group that keeps every token.
      sinks: N0, an int or an int32 scalar.

    Returns:
      The group: slots as T single writes would leave them, exactly; means to float32 rounding.
    """
    if window is None:
        return _write_full(held, new, lengths, counts)
    one = new.k.shape[2] == 1
    return (_write_ring_token if one else _write_ring_chunk)(held, new, lengths, counts, window, sinks)


def dropped(lengths: jax.Array, window: jax.Array, sinks: jax.Array | int) -> jax.Array:
    """Return n int32 [B]. A window of 0 is not set yet: nothing was seen, so nothing was dropped."""
    return ((lengths - sinks - window) * (window > 0)).clip(0)


def _write_full(held: GroupArrays, new: GroupArrays, lengths, counts) -> GroupArrays:
    T, S = new.k.shape[2], held.k.shape[2]
    tokens = jnp.arange(T, dtype=jnp.int32)
    # Invalid tokens aim past the end, each at another slot, and are dropped.
    return _scatter(held, jnp.where(tokens < counts[:, None], lengths[:, None], S) + tokens, new)


def ring_slot(
    position: Int[jax.Array, " B"], window: Int[jax.Array, " B"], sinks: jax.Array | int
) -> Int[jax.Array, " B"]:
    """Return the slot of a position in a windowed group, int32 [B]."""
    return jnp.where(position < sinks, position, sinks + (position - sinks) % jnp.maximum(window, 1))


def _write_ring_token(
    held: GroupArrays, new: GroupArrays, lengths, counts, window, sinks: jax.Array | int
) -> GroupArrays:
    """Return one token a row: one slot read, folded, overwritten."""
    S = held.k.shape[2]
    slot = ring_slot(lengths, window, sinks)
    at = jnp.minimum(slot, S - 1)[:, None, None, None]

    if held.k_mean is not None:
        k, v = (jnp.take_along_axis(x, at, axis=2) for x in (held.k, held.v))
        scales = (None if x is None else jnp.take_along_axis(x, at, axis=3) for x in (held.k_scale, held.v_scale))
        evicted = GroupArrays(k, v, *scales)
        k_mean, v_mean = fold_token(held, evicted, lengths, counts, window, sinks)
        held = held._replace(k_mean=k_mean, v_mean=v_mean)
        new = new._replace(k=ordered_after(new.k, k_mean, lengths), v=ordered_after(new.v, v_mean, lengths))
        if new.k_scale is not None and new.v_scale is not None:
            scales = (ordered_after(x, k_mean, lengths) for x in (new.k_scale, new.v_scale))
            new = GroupArrays(new.k, new.v, *scales)
    return _scatter(held, jnp.where(counts > 0, slot, S)[:, None], new)


def _write_ring_chunk(
    held: GroupArrays, new: GroupArrays, lengths, counts, window, sinks: jax.Array | int
) -> GroupArrays:
    """Write T tokens per row: each slot gathers its newest position, so no slot is written twice."""
    T = new.k.shape[2]
    source = _newest(held.k.shape[2], lengths + counts, window, sinks) - lengths[:, None]
    arrives = (source >= 0) & (counts > 0)[:, None]
    if held.k_mean is not None:
        k_mean, v_mean = fold_chunk(held, new, lengths, counts, window, sinks)
        held = held._replace(k_mean=k_mean, v_mean=v_mean)

    def gather(x, chunk, axis: int):
        shape = [source.shape[0], 1, 1, 1]
        shape[axis] = source.shape[1]
        index = jnp.clip(source, 0, T - 1).reshape(shape)
        return jnp.where(arrives.reshape(shape), jnp.take_along_axis(chunk, index, axis=axis), x)

    held = held._replace(k=gather(held.k, new.k, 2), v=gather(held.v, new.v, 2))
    if held.k_scale is not None:
        held = held._replace(k_scale=gather(held.k_scale, new.k_scale, 3), v_scale=gather(held.v_scale, new.v_scale, 3))
    return held


def fold_token(
    held: GroupArrays,
    evicted: GroupArrays,
    lengths: Int[jax.Array, " B"],
    counts: Int[jax.Array, " B"],
    window: Int[jax.Array, " B"],
    sinks: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """Return k_mean, v_mean once one token per row replaces `evicted` [B,K,1,H], which may be anything in a row that
    drops nothing.
    """
    n = _rows(dropped(lengths, window, sinks))
    folds = _rows((counts > 0) & (lengths >= sinks + window))

    def fold(mean, x, scale):
        before = jnp.where(n > 0, mean, 0.0)
        return jnp.where(folds, before + (dequantize(x, scale) - before) / (n + 1).astype(jnp.float32), mean)

    return fold(held.k_mean, evicted.k, evicted.k_scale), fold(held.v_mean, evicted.v, evicted.v_scale)


def fold_chunk(
    held: GroupArrays,
    new: GroupArrays,
    lengths: Int[jax.Array, " B"],
    counts: Int[jax.Array, " B"],
    window: Int[jax.Array, " B"],
    sinks: jax.Array | int,
) -> tuple[jax.Array, jax.Array]:
    """Return k_mean, v_mean of the group `held` once T tokens per row are written: what leaves the ring or never enters
    it.
    """
    start, tokens = lengths[:, None], jnp.arange(new.k.shape[2], dtype=jnp.int32)[None, :]
    n_before, n_after = dropped(lengths, window, sinks), dropped(lengths + counts, window, sinks)
    first_kept = (sinks + n_after)[:, None]
    old, position = _newest(held.k.shape[2], lengths, window, sinks), start + tokens
    leaves_ring = (old >= sinks) & (old < first_kept)
    leaves_chunk = (tokens < counts[:, None]) & (position >= sinks) & (position < first_kept)

    def fold(mean, x, scale, chunk, chunk_scale):
        total = _masked_sum(x, scale, leaves_ring) + _masked_sum(chunk, chunk_scale, leaves_chunk)
        count = jnp.maximum(n_after, 1).astype(jnp.float32)
        before = jnp.where(_rows(n_before) > 0, mean, 0.0)
        folded = before * _rows(n_before / count) + total / _rows(count)
        return jnp.where(_rows(n_after > n_before), folded, mean)

    return (
        fold(held.k_mean, held.k, held.k_scale, new.k, new.k_scale),
        fold(held.v_mean, held.v, held.v_scale, new.v, new.v_scale),
    )


def _newest(S: int, length: jax.Array, window: jax.Array, sinks: jax.Array | int) -> jax.Array:
    """Return int32 [B,S]: the position each slot holds once length [B] tokens were seen; below 0 where it is empty."""
    slots, ring, length = jnp.arange(S, dtype=jnp.int32)[None, :], jnp.maximum(window, 1)[:, None], length[:, None]
    laps = jnp.where(slots < sinks, 0, (length - 1 - slots) // ring)
    return jnp.where((slots < sinks + ring) & (slots < length), slots + laps * ring, -1)


def _rows(x: jax.Array) -> jax.Array:
    """Return [B] against [B,K,s,H]."""
    return x[:, None, None, None]


def _scatter(held: GroupArrays, slots: jax.Array, new: GroupArrays) -> GroupArrays:
    """Return the tokens at slots [B,T], distinct in a row; slots past S are dropped."""
    batch = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]

    def tokens(x, rows):
        return x.at[batch, :, slots].set(rows.transpose(0, 2, 1, 3), mode="drop", unique_indices=True)

    def scales(x, rows):
        return x.at[batch, :, 0, slots].set(rows[:, :, 0].swapaxes(1, 2), mode="drop", unique_indices=True)

    held = held._replace(k=tokens(held.k, new.k), v=tokens(held.v, new.v))
    if held.k_scale is not None:
        held = held._replace(k_scale=scales(held.k_scale, new.k_scale), v_scale=scales(held.v_scale, new.v_scale))
    return held


def _masked_sum(x: jax.Array, scale: jax.Array | None, mask: jax.Array) -> jax.Array:
    """Sum x [B,K,s,H] over mask [B,s], float32 [B,K,1,H]; NaN outside the mask stays outside."""
    return jnp.sum(jnp.where(mask[:, None, :, None], dequantize(x, scale), 0.0), axis=2, keepdims=True)


def quantize(
    x: Float[jax.Array, "B K T H"], dtype: jnp.dtype
) -> tuple[jax.Array, Float32[jax.Array, "B K 1 T"] | None]:
    """Return x [B,K,T,H] in the cache type `dtype`, and the scales [B,K,1,T] of int8.

    int8 has one float32 scale per token and head, max|x| / 127, so that scaling touches rows of logits and of weights
    and never the cache. float8_e4m3fn has an exponent and no scale: values beyond ±448 are clipped.
    """
    if dtype == INT8:
        x = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axis=-1)
        scale = jnp.where(largest > 0, largest, 1.0) / 127.0
        return jnp.round(x / scale[..., None]).astype(INT8), scale[:, :, None]
    if dtype == FP8:
        largest = float(jnp.finfo(FP8).max)
        x = jnp.clip(x, -largest, largest)
    return x.astype(dtype), None


def dequantize(x: jax.Array, scale: Float32[jax.Array, "B K 1 T"] | None) -> Float32[jax.Array, "B K T H"]:
    """Return the float32 values of x [B,K,T,H]."""
    x = x.astype(jnp.float32)
    return x if scale is None else x * scale[:, :, 0, :, None]


def ordered_after(x: jax.Array, earlier: jax.Array, lengths: jax.Array) -> jax.Array:
    """Return x, ordered after `earlier`. `lengths` (any non-negative runtime values) hide the always-true condition.

    To a compiler, reading a cache and writing it are independent, and if it writes first it keeps a copy to read from.
    An optimization barrier prevents that on TPU and GPU. XLA on CPU drops barriers, so one element of x is also chosen
    by a condition that always holds but that the compiler cannot know.
    """
    x, earlier = lax.optimization_barrier((x, earlier))
    corner = (0,) * x.ndim
    chosen = jnp.where(lengths[0] >= 0, x[corner], earlier[(0,) * earlier.ndim].astype(x.dtype))
    return x.at[corner].set(chosen)
