"""Attention and cache writes on a mesh: which part of each array a device gets, and `attention.py` on that part.

A compiler cannot partition kernels, so they run inside `shard_map`; what is between them is partitioned from the
weights.

    queries, outputs   [B, K, T, G, H]   heads over `heads`; G over `rows` where it divides, T where that divides
    k, v of a call     [B, K, T, H]      heads over `heads`, the same on all `rows`
    cache              by head or by slot over both (`cache.cache_pspecs`)
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .. import attention
from ..attention import Slopes
from ..cache import AttentionMetadata, Group
from ..kernels.cache_write import ordered_after
from ..sharding import HEADS, MODEL, ROWS, Axes, model_devices
from . import by_slot
from .by_slot import RowSplit
from .cache import cache_pspecs, exchange_tokens, write

if TYPE_CHECKING:
    from .placement import MeshPlacement

Layer = tuple[Group, ...]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: Layer,
    meta: AttentionMetadata,
    *,
    start: jax.Array | int,
    group_size: int,
    slopes: Slopes,
) -> jax.Array:
    """Run `attention.attend` of a chunk of queries [B, K, Tq·G, H]."""

    def run(q, k, v, layer, meta, start, *, row_split):
        out = _attend_here(_packed(q), k, v, layer, meta, start, q.shape[3], slopes, row_split)
        return out.reshape(q.shape), ()

    out, _ = _on_queries(run, q, k, v, layer, meta, group_size, jnp.asarray(start, jnp.int32))
    return out


def attend_and_write(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: Layer, meta: AttentionMetadata, slopes: Slopes
) -> tuple[jax.Array, Layer]:
    """Run `attention.attend_and_write` of a whole call."""

    def run(q, k, v, layer, meta, *, row_split):
        out = _attend_here(_packed(q), k, v, layer, meta, 0, q.shape[3], slopes, row_split)
        k, v = (ordered_after(x, out, meta.length) for x in exchange_tokens(layer, k, v, meta))
        return out.reshape(q.shape), jax.tree.leaves(write(layer, k, v, meta))

    out, leaves = _on_queries(run, q, k, v, layer, meta, q.shape[2] // k.shape[2])
    return out, jax.tree.unflatten(jax.tree.structure(layer), leaves)


def _attend_here(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: Layer,
    meta: AttentionMetadata,
    start: jax.Array | int,
    group_size: int,
    slopes: Slopes,
    row_split: RowSplit,
) -> jax.Array:
    """Attend with this device's queries; `start` and slopes are of all devices' queries."""
    mine = functools.partial(by_slot.of_this_device, q, start, group_size, slopes, row_split)
    if meta.fresh or meta.spec.shards == 1:
        start, slopes = mine()
        return attention.attend(q, k, v, layer, meta, start=start, group_size=group_size, slopes=slopes)
    state = by_slot.attend(q, layer, meta, start=start, group_size=group_size, slopes=slopes, row_split=row_split)
    start, slopes = mine()
    few = k.shape[2] <= attention.FEW_TOKENS
    implementation = "xla" if few else meta.spec.kernels
    own = functools.partial(attention.attend_own, q, k, v, meta=meta, start=start, group_size=group_size)
    return own(slopes=slopes, state=state, implementation=implementation)  # type: ignore[return-value]


def write_call(layer: Layer, k: jax.Array, v: jax.Array, meta: AttentionMetadata) -> Layer:
    """Run `cache.write` of a call's k, v [B, K, T, H]."""
    placement, rows = _placement(meta), _placement(meta).rows(k.shape[0])
    leaves, tree = jax.tree.flatten(layer)
    pspecs = cache_pspecs(layer, meta.spec, k.shape[0])

    def run(k, v, leaves, meta):
        layer = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(write(layer, *exchange_tokens(layer, k, v, meta), meta))

    heads = PartitionSpec(rows, HEADS)
    mapped = _shard_map(run, placement.mesh, (heads, heads, pspecs, PartitionSpec(rows)), pspecs)
    return jax.tree.unflatten(tree, mapped(k, v, leaves, meta))


def write_after(
    x: jax.Array, k: jax.Array, v: jax.Array, layer: Layer, meta: AttentionMetadata
) -> tuple[jax.Array, Layer]:
    """Run `attention.write_after`, x [B, T, D] spread as `hidden_spec` says."""
    placement = _placement(meta)
    leaves, tree = jax.tree.flatten(layer)
    at, pspecs = hidden_spec(x, placement), cache_pspecs(layer, meta.spec, x.shape[0])

    def run(x, k, v, leaves, meta):
        k, v = (ordered_after(a, x, meta.length) for a in (k, v))
        layer = jax.tree.unflatten(tree, leaves)
        layer = write(layer, *exchange_tokens(layer, k, v, meta), meta)
        return attention.ordered_after_write(x, layer, meta), jax.tree.leaves(layer)

    heads = PartitionSpec(at[0], HEADS)
    ins = (at, heads, heads, pspecs, PartitionSpec(at[0]))
    x, leaves = _shard_map(run, placement.mesh, ins, (at, pspecs))(x, k, v, leaves, meta)
    return x, jax.tree.unflatten(tree, leaves)


def zeros(x: jax.Array, shape: tuple[int, ...], meta: AttentionMetadata) -> jax.Array:
    """Return zeros [B, K, T, H] for the keys or values of a call, which depend on x [B, T, D]."""
    placement = _placement(meta)
    rows = placement.rows(x.shape[0])
    at = PartitionSpec(rows, HEADS)
    part = NamedSharding(placement.mesh, at).shard_shape(shape)

    def run(x, meta):
        return jnp.broadcast_to(ordered_after(jnp.zeros((1,), x.dtype), x, meta.length), part)

    return _shard_map(run, placement.mesh, (hidden_spec(x, placement), PartitionSpec(rows)), at)(x, meta)


def take(x: jax.Array, start: jax.Array, tokens: int, placement: MeshPlacement) -> jax.Array:
    """Return tokens [start, start + tokens) of the hidden states x [B, T, D] of a long call, whole on every device."""
    at = hidden_spec(x, placement)

    # Cut first: a compiler that only knows the result's sharding gathers all tokens and cuts then.
    def run(x, start):
        part = lax.dynamic_slice_in_dim(x, start, tokens, axis=1)
        return part if at[2] is None else lax.all_gather(part, MODEL, axis=2, tiled=True)

    ins = (at, PartitionSpec())
    return _shard_map(run, placement.mesh, ins, PartitionSpec(at[0]))(x, jnp.asarray(start, jnp.int32))


def hidden_spec(x: Any, placement: MeshPlacement) -> PartitionSpec:
    """Return the PartitionSpec of the hidden states [B, T, D] of a long call.

    They are as long as the prompt, so D is spread over all devices of the model axes where it divides.
    """
    whole = x.shape[2] % model_devices(placement.mesh) == 0
    return PartitionSpec(placement.rows(x.shape[0]), None, MODEL if whole else None)


def _on_queries(
    run: Any,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: Layer,
    meta: AttentionMetadata,
    group_size: int,
    *start: jax.Array,
) -> Any:
    """Call `run` on each device's queries [B, K, T, G, H] and its part of the layer; q is [B, K, T·G, H].

    `run` returns its output in the queries' shape and, unless it gets a start, the layer's new leaves.
    """
    placement, (B, K, R, H) = _placement(meta), q.shape
    rows, pspecs = placement.rows(B), cache_pspecs(layer, meta.spec, B)
    shape = (B, K, R // group_size, group_size, H)
    row_split, axes = _row_split(shape, placement.mesh)
    leaves, tree = jax.tree.flatten(layer)

    def on_device(q, k, v, leaves, meta, *start):
        return run(q, k, v, jax.tree.unflatten(tree, leaves), meta, *start, row_split=row_split)

    queries, heads = PartitionSpec(rows, HEADS, *axes), PartitionSpec(rows, HEADS)
    ins = (queries, heads, heads, pspecs, PartitionSpec(rows), *(PartitionSpec() for _ in start))
    mapped = _shard_map(on_device, placement.mesh, ins, (queries, () if start else pspecs))
    out, leaves = mapped(q.reshape(shape), k, v, leaves, meta, *start)
    return out.reshape(q.shape), leaves


def _row_split(shape: tuple[int, ...], mesh: Mesh) -> tuple[RowSplit, tuple[Axes, Axes]]:
    """Return how devices that share KV heads divide queries [B, K, T, G, H], and the mesh axes of T and G."""
    _, _, T, G, _ = shape
    parts = mesh.shape[ROWS]
    if G % parts == 0:
        return "group", (None, ROWS)
    if T % parts == 0:
        return "tokens", (ROWS, None)
    return None, (None, None)


def _packed(q: jax.Array) -> jax.Array:
    """Return [B, K, T, G, H] -> [B, K, T·G, H]"""
    return q.reshape(*q.shape[:2], -1, q.shape[4])


def _placement(meta: AttentionMetadata) -> MeshPlacement:
    assert meta.spec.placement is not None
    return meta.spec.placement


def _shard_map(run: Any, mesh: Mesh, ins: Any, outs: Any) -> Any:
    return jax.shard_map(run, mesh=mesh, in_specs=ins, out_specs=outs, check_vma=False)
