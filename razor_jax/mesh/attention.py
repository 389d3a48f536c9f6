"""Attention and cache writes on a mesh: which part of each array a device gets, and `attention.py` on that part.

Kernels cannot be partitioned by a compiler, so they run inside `shard_map`; what lies between them is partitioned
from the weights. Without a mesh these are the functions of `attention.py` themselves.

    queries, outputs   [B, K, T, G, H]   heads over `heads`; G over `rows` where it divides, else T where that does
    k, v of a call     [B, K, T, H]      heads over `heads`, alike on all `rows`
    cache              by head or by slot over both (`cache.places`)
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from .. import attention
from .. import cache as kv
from ..cache import Call, Group
from ..kernels.ordering import ordered_after
from ..sharding import HEADS, MODEL, ROWS, Axes, model_devices
from .by_slot import Split


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: tuple[Group, ...], call: Call, *, start, group_size: int, slopes
) -> jax.Array:
    """`attention.attend` of a chunk of queries [B, K, Tq·G, H]."""
    if call.spec.mesh is None:
        return attention.attend(q, k, v, layer, call, start=start, group_size=group_size, slopes=slopes)

    def run(q, k, v, layer, call, start, *, split):
        out = attention.attend(
            _packed(q), k, v, layer, call, start=start, group_size=q.shape[3], slopes=slopes, split=split
        )
        return out.reshape(q.shape), ()

    out, _ = _queries(run, q, k, v, layer, call, group_size, jnp.asarray(start, jnp.int32))
    return out


def attend_and_write(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: tuple[Group, ...], call: Call, slopes: np.ndarray | None
) -> tuple[jax.Array, tuple[Group, ...]]:
    """`attention.attend_and_write` of a whole call."""
    if call.spec.mesh is None:
        return attention.attend_and_write(q, k, v, layer, call, slopes)

    def run(q, k, v, layer, call, *, split):
        out, layer = attention.attend_and_write(_packed(q), k, v, layer, call, slopes, q.shape[3], split)
        return out.reshape(q.shape), jax.tree.leaves(layer)

    out, leaves = _queries(run, q, k, v, layer, call, q.shape[2] // k.shape[2])
    return out, jax.tree.unflatten(jax.tree.structure(layer), leaves)


def write_behind(x: jax.Array, k, v, layer: tuple[Group, ...], call: Call) -> tuple[jax.Array, tuple[Group, ...]]:
    """`attention.write_behind`, x [B, T, D] lying as `hidden` says."""
    if call.spec.mesh is None:
        return attention.write_behind(x, k, v, layer, call)
    leaves, tree = jax.tree.flatten(layer)
    at, places = hidden(x, call), kv.places(layer, call.spec, x.shape[0])

    def run(x, k, v, leaves, call):
        x, layer = attention.write_behind(x, k, v, jax.tree.unflatten(tree, leaves), call)
        return x, jax.tree.leaves(layer)

    heads = PartitionSpec(at[0], HEADS)
    x, leaves = _shard_map(run, call, (at, heads, heads, places, PartitionSpec(at[0])), (at, places))(
        x, k, v, leaves, call
    )
    return x, jax.tree.unflatten(tree, leaves)


def blank(x: jax.Array, shape: tuple[int, ...], call: Call) -> jax.Array:
    """Zeros [B, K, T, H] for the keys or values of a call, after x [B, T, D]: a buffer that needs nothing would be
    laid out for every layer at once."""

    def zeros(x, call, shape):
        zero = ordered_after(jnp.zeros((1,), x.dtype), x, call.length)
        return jnp.broadcast_to(zero, shape)

    mesh = call.spec.mesh
    if mesh is None:
        return zeros(x, call, shape)
    rows = call.spec.rows(call.length.shape[0])
    at = PartitionSpec(rows, HEADS)
    part = jax.sharding.NamedSharding(mesh, at).shard_shape(shape)
    run = functools.partial(zeros, shape=part)
    return _shard_map(run, call, (hidden(x, call), PartitionSpec(rows)), at)(x, call)


def chunk(x: jax.Array, start: jax.Array, tokens: int, call: Call) -> jax.Array:
    """Tokens [start, start + tokens) of the hidden states x [B, T, D] of a long call, whole on every device."""

    if call.spec.mesh is None:
        return lax.dynamic_slice_in_dim(x, start, tokens, axis=1)
    at = hidden(x, call)

    # Cut first: a compiler that is only told where the result lies gathers all tokens and cuts then.
    def whole(x, start):
        part = lax.dynamic_slice_in_dim(x, start, tokens, axis=1)
        return part if at[2] is None else lax.all_gather(part, MODEL, axis=2, tiled=True)

    return _shard_map(whole, call, (at, PartitionSpec()), PartitionSpec(at[0]))(x, jnp.asarray(start, jnp.int32))


def hidden(x: Any, call: Call) -> PartitionSpec:
    """Where the hidden states [B, T, D] of a long call lie: their D over all devices of the model axes, for they are
    as long as the prompt."""
    mesh = call.spec.mesh
    assert mesh is not None
    whole = x.shape[2] % model_devices(mesh) == 0
    return PartitionSpec(call.spec.rows(x.shape[0]), None, MODEL if whole else None)


def _queries(run, q: jax.Array, k, v, layer: tuple[Group, ...], call: Call, group_size: int, *start) -> Any:
    """`run` on each device's queries [B, K, T, G, H] and its part of the layer, out of q [B, K, T·G, H].

    `run` gives its output alike and, unless it has a start, the layer's new leaves.
    """
    mesh, (B, K, R, H) = call.spec.mesh, q.shape
    assert mesh is not None
    rows, places = call.spec.rows(B), kv.places(layer, call.spec, B)
    shape = (B, K, R // group_size, group_size, H)
    split, axes = _split(shape, mesh)
    leaves, tree = jax.tree.flatten(layer)

    def on_device(q, k, v, leaves, call, *start):
        return run(q, k, v, jax.tree.unflatten(tree, leaves), call, *start, split=split)

    queries, heads = PartitionSpec(rows, HEADS, *axes), PartitionSpec(rows, HEADS)
    ins = (queries, heads, heads, places, PartitionSpec(rows), *(PartitionSpec() for _ in start))
    mapped = _shard_map(on_device, call, ins, (queries, () if start else places))
    out, leaves = mapped(q.reshape(shape), k, v, leaves, call, *start)
    return out.reshape(q.shape), leaves


def _split(shape: tuple[int, ...], mesh: Mesh) -> tuple[Split, tuple[Axes, Axes]]:
    """How devices that share KV heads divide queries [B, K, T, G, H], and the axes of T and G."""
    _, _, T, G, _ = shape
    parts = mesh.shape[ROWS]
    if G % parts == 0:
        return "group", (None, ROWS)
    if T % parts == 0:
        return "tokens", (ROWS, None)
    return None, (None, None)


def _packed(q: jax.Array) -> jax.Array:
    """[B, K, T, G, H] -> [B, K, T·G, H]"""
    return q.reshape(*q.shape[:2], -1, q.shape[4])


def _shard_map(run, call: Call, ins: Any, outs: Any) -> Any:
    return jax.shard_map(run, mesh=call.spec.mesh, in_specs=ins, out_specs=outs, check_vma=False)
