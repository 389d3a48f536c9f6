"""Cache writes in plain XLA: the reference for every kernel, and the fallback where no kernel runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Float32, Int

from .. import FP8, INT8, on_bits
from .arrays import CacheWrite, GroupArrays


def write(call: CacheWrite) -> GroupArrays:
    """Append tokens to a head group; see `CacheWrite`."""
    token = call.tokens.k.shape[2] == 1
    if call.block_table is not None and not token:
        return _write_chunk_in_pages(call)
    if call.window is None:
        return _write_full(call)
    return _write_ring_token(call) if token else _write_ring_chunk(call)


def dropped(lengths: jax.Array, window: jax.Array, sinks: jax.Array | int) -> jax.Array:
    """Return n, int32 [B]. A window of 0 belongs to a row that has seen nothing, and so has dropped nothing."""
    return ((lengths - sinks - window) * (window > 0)).clip(0)


def ring_slot(
    position: Int[jax.Array, "B ..."], window: Int[jax.Array, "B ..."], sinks: jax.Array | int
) -> Int[jax.Array, "B ..."]:
    """Return the slot of positions in a windowed group, int32 [B, …], by the window of each row."""
    return jnp.where(position < sinks, position, sinks + (position - sinks) % jnp.maximum(window, 1))


def _ring(call: CacheWrite) -> tuple[jax.Array, jax.Array | int]:
    assert call.window is not None, "a full group has no ring"
    return call.window, call.sinks


def _write_full(call: CacheWrite) -> GroupArrays:
    T, S = call.tokens.k.shape[2], row_slots(call)
    index = jnp.arange(T, dtype=jnp.int32)
    # Invalid tokens aim past the end, each at another slot, and are ignored.
    slots = jnp.where(index < call.counts[:, None], call.lengths[:, None], S) + index
    return _scatter(call.group, slots, call.tokens, call.block_table)


def _write_ring_token(call: CacheWrite) -> GroupArrays:
    """Write one token per row: read its slot, fold the evicted token into the means, overwrite the slot."""
    group, tokens, lengths, counts = call[:4]
    window, sinks = _ring(call)
    S = row_slots(call)
    slot = ring_slot(lengths, window, sinks)

    if group.k_mean is not None:
        k_mean, v_mean = fold_token(call, _read_slot(call, jnp.minimum(slot, S - 1)))
        group = group._replace(k_mean=k_mean, v_mean=v_mean)
        tokens = tokens._replace(k=ordered_after(tokens.k, k_mean, lengths), v=ordered_after(tokens.v, v_mean, lengths))
        if tokens.k_scale is not None and tokens.v_scale is not None:
            scales = (ordered_after(x, k_mean, lengths) for x in (tokens.k_scale, tokens.v_scale))
            tokens = GroupArrays(tokens.k, tokens.v, *scales)
    return _scatter(group, jnp.where(counts > 0, slot, S)[:, None], tokens, call.block_table)


def row_slots(call: CacheWrite) -> int:
    """Return the slots of a row."""
    slots = call.group.k.shape[2]
    return slots if call.block_table is None else slots * call.block_table.shape[1]


def _read_slot(call: CacheWrite, slot: jax.Array) -> GroupArrays:
    """Return the token in one slot of each row, int32 [B], as [B,K,1,H] with scales [B,K,1,1]."""
    group, table = call.group, call.block_table
    if table is not None:
        # Pages become rows: then the slot is that inside its page.
        page, slot = jnp.divmod(slot, group.k.shape[2])
        page = jnp.take_along_axis(table, page[:, None], axis=1)[:, 0]
        page = jnp.clip(page, 0, len(group.k) - 1)  # A row without tokens may have any table.
        scales = (None if x is None else x[page, :, :, slot, None] for x in (group.k_scale, group.v_scale))
        return GroupArrays(group.k[page, :, slot, None], group.v[page, :, slot, None], *scales)
    at = slot[:, None, None, None]
    k, v = (on_bits(lambda x: jnp.take_along_axis(x, at, axis=2), x) for x in (group.k, group.v))
    scales = (None if x is None else jnp.take_along_axis(x, at, axis=3) for x in (group.k_scale, group.v_scale))
    return GroupArrays(k, v, *scales)


def _write_chunk_in_pages(call: CacheWrite) -> GroupArrays:
    """Write T tokens per row: gather its pages, write the row, and put its pages back.

    On TPU a scatter of tokens would copy the whole pool, a scatter of pages copies nothing.
    """
    group, table, window = call.group, call.block_table, call.window
    assert table is not None
    page, B = group.k.shape[2], table.shape[0]
    first_slot = jnp.arange(table.shape[1], dtype=jnp.int32) * page
    end = call.lengths + call.counts
    last = end if window is None else jnp.minimum(end, call.sinks + window)
    valid = (first_slot < last[:, None]) & (call.counts > 0)[:, None]
    # Only a ring changes slots before its length.
    changes = valid & (first_slot + page > call.lengths[:, None]) if window is None else valid
    # Pages that the row does not have are read from page 0, and not put back.
    source, target = jnp.where(valid, table, 0), jnp.where(changes, table, len(group.k))

    def row(pool: jax.Array, axis: int) -> jax.Array:
        return jnp.moveaxis(pool[source], 1, axis).reshape(_row_shape(pool, table, axis))

    def put(pool: jax.Array, x: jax.Array, axis: int) -> jax.Array:
        pages = x.reshape(*x.shape[:axis], table.shape[1], page, *x.shape[axis + 1 :])
        pages = jnp.moveaxis(pages, axis, 1).reshape(B * table.shape[1], *pool.shape[1:])
        return pool.at[target.reshape(-1)].set(pages, mode="drop")

    rows = group._replace(k=row(group.k, 2), v=row(group.v, 2))
    if group.k_scale is not None and group.v_scale is not None:
        rows = rows._replace(k_scale=row(group.k_scale, 3), v_scale=row(group.v_scale, 3))
    rows = write(call._replace(group=rows, block_table=None))
    written = rows._replace(k=put(group.k, rows.k, 2), v=put(group.v, rows.v, 2))
    if group.k_scale is None or group.v_scale is None or rows.k_scale is None or rows.v_scale is None:
        return written
    return written._replace(k_scale=put(group.k_scale, rows.k_scale, 3), v_scale=put(group.v_scale, rows.v_scale, 3))


def _row_shape(pool: jax.Array, table: jax.Array, axis: int) -> tuple[int, ...]:
    """Return the shape of rows [B,K,S,H] or [B,K,1,S] whose slots, on `axis`, are in pages of a pool."""
    shape = [table.shape[0], *pool.shape[1:]]
    shape[axis] *= table.shape[1]
    return tuple(shape)


def _write_ring_chunk(call: CacheWrite) -> GroupArrays:
    """Write T tokens per row: each slot gathers its newest position, so no slot is written twice."""
    group, tokens, lengths, counts = call[:4]
    window, sinks = _ring(call)
    T = tokens.k.shape[2]
    source = newest_positions(group.k.shape[2], lengths + counts, window, sinks) - lengths[:, None]
    arrives = (source >= 0) & (counts > 0)[:, None]
    if group.k_mean is not None:
        k_mean, v_mean = fold_chunk(call)
        group = group._replace(k_mean=k_mean, v_mean=v_mean)

    def gather(x, chunk, axis: int):
        shape = [source.shape[0], 1, 1, 1]
        shape[axis] = source.shape[1]
        index = jnp.clip(source, 0, T - 1).reshape(shape)
        return jnp.where(arrives.reshape(shape), jnp.take_along_axis(chunk, index, axis=axis), x)

    group = group._replace(k=gather(group.k, tokens.k, 2), v=gather(group.v, tokens.v, 2))
    if group.k_scale is not None:
        k_scale, v_scale = gather(group.k_scale, tokens.k_scale, 3), gather(group.v_scale, tokens.v_scale, 3)
        group = group._replace(k_scale=k_scale, v_scale=v_scale)
    return group


def fold_token(call: CacheWrite, evicted: GroupArrays) -> tuple[jax.Array, jax.Array]:
    """Return k_mean, v_mean once one token per row replaces `evicted` [B,K,1,H].

    In rows that drop nothing `evicted` may be anything.
    """
    group, _, lengths, counts = call[:4]
    window, sinks = _ring(call)
    n = _per_row(dropped(lengths, window, sinks))
    folds = _per_row((counts > 0) & (lengths >= sinks + window))

    def fold(mean, x, scale):
        before = jnp.where(n > 0, mean, 0.0)
        return jnp.where(folds, before + (dequantize(x, scale) - before) / (n + 1).astype(jnp.float32), mean)

    return fold(group.k_mean, evicted.k, evicted.k_scale), fold(group.v_mean, evicted.v, evicted.v_scale)


def fold_chunk(call: CacheWrite) -> tuple[jax.Array, jax.Array]:
    """Return k_mean, v_mean once T tokens per row are written. Tokens that leave the ring or never enter it join."""
    group, new, lengths, counts = call[:4]
    window, sinks = _ring(call)
    start, tokens = lengths[:, None], jnp.arange(new.k.shape[2], dtype=jnp.int32)[None, :]
    n_before, n_after = dropped(lengths, window, sinks), dropped(lengths + counts, window, sinks)
    first_kept = (sinks + n_after)[:, None]
    old, position = newest_positions(group.k.shape[2], lengths, window, sinks), start + tokens
    leaves_ring = (old >= sinks) & (old < first_kept)
    leaves_chunk = (tokens < counts[:, None]) & (position >= sinks) & (position < first_kept)

    def fold(mean, x, scale, chunk, chunk_scale):
        total = _masked_sum(x, scale, leaves_ring) + _masked_sum(chunk, chunk_scale, leaves_chunk)
        count = jnp.maximum(n_after, 1).astype(jnp.float32)
        before = jnp.where(_per_row(n_before) > 0, mean, 0.0)
        folded = before * _per_row(n_before / count) + total / _per_row(count)
        return jnp.where(_per_row(n_after > n_before), folded, mean)

    return (
        fold(group.k_mean, group.k, group.k_scale, new.k, new.k_scale),
        fold(group.v_mean, group.v, group.v_scale, new.v, new.v_scale),
    )


def newest_positions(S: int, length: jax.Array, window: jax.Array, sinks: jax.Array | int) -> jax.Array:
    """Return the position in each slot once length [B] tokens were seen, int32 [B,S]; negative if it is empty."""
    slots, ring, length = jnp.arange(S, dtype=jnp.int32)[None, :], jnp.maximum(window, 1)[:, None], length[:, None]
    laps = jnp.where(slots < sinks, 0, (length - 1 - slots) // ring)
    return jnp.where((slots < sinks + ring) & (slots < length), slots + laps * ring, -1)


def _per_row(x: jax.Array) -> jax.Array:
    """Reshape [B] to broadcast against [B,K,s,H]."""
    return x[:, None, None, None]


def _scatter(group: GroupArrays, slots: jax.Array, tokens: GroupArrays, table: jax.Array | None) -> GroupArrays:
    """Write the tokens to slots [B,T], distinct within a row. Slots past S are ignored."""
    batch = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]
    if table is not None:
        # Pages become rows: then the slot is that inside its page. Past the end of the table is past the pool.
        index, slots = jnp.divmod(slots, group.k.shape[2])
        page = jnp.take_along_axis(table, jnp.minimum(index, table.shape[1] - 1), axis=1)
        batch = jnp.where(index < table.shape[1], page, len(group.k))

    def rows(x, new):
        return x.at[batch, :, slots].set(new.transpose(0, 2, 1, 3), mode="drop", unique_indices=True)

    def scales(x, new):
        return x.at[batch, :, 0, slots].set(new[:, :, 0].swapaxes(1, 2), mode="drop", unique_indices=True)

    group = group._replace(k=on_bits(rows, group.k, tokens.k), v=on_bits(rows, group.v, tokens.v))
    if group.k_scale is not None:
        k_scale, v_scale = scales(group.k_scale, tokens.k_scale), scales(group.v_scale, tokens.v_scale)
        group = group._replace(k_scale=k_scale, v_scale=v_scale)
    return group


def _masked_sum(x: jax.Array, scale: jax.Array | None, mask: jax.Array) -> jax.Array:
    """Sum x [B,K,s,H] over mask [B,s], float32 [B,K,1,H]. NaN outside the mask stays outside."""
    return jnp.sum(jnp.where(mask[:, None, :, None], dequantize(x, scale), 0.0), axis=2, keepdims=True)


def quantize(
    x: Float[jax.Array, "B K T H"], dtype: jnp.dtype
) -> tuple[jax.Array, Float32[jax.Array, "B K 1 T"] | None]:
    """Return x [B,K,T,H] in the cache type `dtype`, and its scales [B,K,1,T] if that is int8.

    int8 has one float32 scale per token and head, max|x| / 127, so scaling touches rows of logits and of weights, never
    the cache. float8_e4m3fn has an exponent of its own and no scale; values beyond ±448 are clipped.
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
