"""Attention over a cache by slot: what one device does, and how devices merge.

Inside `shard_map` over (data, heads, rows). A device stores some slots of every head (`slots.py`) and computes the
queries of its own heads. Two exchanges combine them: every device receives the queries of all heads, which are few, and
attends to its slots with them; the partial softmaxes and its part of the compensation token then go to the device of
those heads. The call's own tokens are attended to there, without an exchange.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from .. import cache as kv
from ..cache import AttentionMetadata, Group
from ..kernels import attention as kernel
from ..sharding import HEADS, MODEL, ROWS
from .cache import take_heads
from .slots import Shard

# What devices that share KV heads (axis `rows`) divide: tokens of the call, query heads of a group, or nothing, and
# each computes everything.
RowSplit = Literal["tokens", "group"] | None
_AXIS = {"tokens": 2, "group": 3}  # of [B, K, T, G, …]


class Partial(NamedTuple):
    """The result of one device, float32.

    Attributes:
      acc, m, l: the partial softmax over its slots, [B, K, T, G, H] and [B, K, T, G].
      logit: [B, K, T, G], its part of the compensation token's; zeros for heads without one.
      value: [B, K, 1, 1, H], its part of that token's value.
    """

    acc: jax.Array
    m: jax.Array
    l: jax.Array
    logit: jax.Array
    value: jax.Array


def attend(
    q: jax.Array,
    layer: tuple[Group, ...],
    meta: AttentionMetadata,
    *,
    start: jax.Array | int,
    group_size: int,
    slopes: np.ndarray | jax.Array | None,
    row_split: RowSplit,
) -> kernel.State:
    """Return the state of this device's queries q [B, k, R, H] over all slots of the layer; arguments as in
    `attention.attend`."""
    placement = meta.spec.placement
    assert placement is not None
    positions = placement.group_positions(meta.spec, layer)
    mine = q.reshape(*q.shape[:2], -1, group_size, q.shape[3])
    here = _attend_here(_gather_queries(mine, row_split), layer, positions, meta, start, slopes)
    partials = _exchange(here, placement.mesh, row_split)
    has_token = np.zeros((meta.spec.heads.num_kv_heads,), bool)
    for group, heads in zip(layer, positions, strict=True):
        has_token[heads] = group.k_mean is not None
    has_token = lax.dynamic_slice_in_dim(jnp.asarray(has_token), lax.axis_index(HEADS) * q.shape[1], q.shape[1])
    n = jnp.where(has_token, meta.dropped[:, None], 0)
    return _merge(partials, n[:, :, None, None])


def of_this_device(
    q: jax.Array, start: jax.Array | int, group_size: int, slopes: np.ndarray | jax.Array | None, row_split: RowSplit
) -> tuple[jax.Array | int, jax.Array | None]:
    """Return `start` and slopes [K, G] of this device's queries q [B, k, R, H], given those of all."""
    if row_split == "tokens":
        start = start + lax.axis_index(ROWS) * (q.shape[2] // group_size)
    if slopes is None:
        return start, None
    first = (lax.axis_index(HEADS) * q.shape[1], lax.axis_index(ROWS) * group_size if row_split == "group" else 0)
    return start, lax.dynamic_slice(jnp.asarray(slopes, jnp.float32), first, (q.shape[1], group_size))


def _gather_queries(q: jax.Array, row_split: RowSplit) -> jax.Array:
    """Return the queries [B, K, T, G, H] of all devices."""
    if row_split is not None:
        q = lax.all_gather(q, ROWS, axis=_AXIS[row_split], tiled=True)
    return lax.all_gather(q, HEADS, axis=1, tiled=True)


def _attend_here(
    q: jax.Array, layer: tuple[Group, ...], positions: list[np.ndarray], meta: AttentionMetadata, start, slopes
) -> Partial:
    """Attend to this device's slots with the queries [B, K, T, G, H] of all devices."""
    scale = 1.0 / math.sqrt(q.shape[-1])
    B, K, T, G, H = q.shape
    here = Shard(meta.spec.shards, lax.axis_index(MODEL))
    at = meta.length[:, None] + start + jnp.arange(T, dtype=jnp.int32)
    parts, tokens = [], []
    for group, heads in zip(layer, positions, strict=True):
        rows, alibi = take_heads(q, heads), None
        if slopes is not None:
            own = jnp.asarray(slopes, jnp.float32)[heads]
            alibi = kernel.Alibi(own, at, kv.positions(group, meta, here.slots(group.k.shape[2])))
        tokens.append(_compensation(rows, group, meta, here, scale))
        rows, valid = rows.reshape(B, len(heads), T * G, H), here.share(meta.valid(group))
        arrays = group.k, group.v, valid, None, group.k_scale, group.v_scale, group.table
        parts.append(kernel.Part(rows, *arrays, alibi))
    state = kernel.attend_groups(parts, scale=scale, return_state=True, implementation=meta.spec.kernels)
    acc, m, l = (x.reshape(B, K, T, G, *x.shape[3:]) for x in cast(kernel.State, state))
    logit, value = (jnp.concatenate(x, axis=1) for x in zip(*tokens, strict=True))
    back = np.argsort(np.concatenate(positions))
    return Partial(*(take_heads(x, back) for x in (acc, m, l, logit, value)))


def _compensation(
    q: jax.Array, group: Group, meta: AttentionMetadata, here: Shard, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Return this device's part of the compensation token's logit for queries q [B, K, T, G, H], and of its value.

    The token is the mean of the devices' means, weighted by what each has dropped. Its logit is linear in its key, so
    parts of the logit add up as parts of the value do.
    """
    if group.k_mean is None or group.v_mean is None:
        return jnp.zeros(q.shape[:4], jnp.float32), jnp.zeros((*q.shape[:2], 1, 1, q.shape[4]), jnp.float32)
    mine = here.dropped(meta.length, meta.window, meta.spec.sinks)
    share = (mine / jnp.maximum(meta.dropped, 1)).astype(jnp.float32)[:, None, None, None]
    # The means of an empty set are unused memory: keep them out of the arithmetic on both sides.
    k, v = (jnp.where(share > 0, x, 0.0) for x in (group.k_mean, group.v_mean))
    logit = jnp.sum(q.astype(jnp.float32) * k[:, :, None], axis=-1) * (share * scale)
    return logit, (v * share)[:, :, None]


def _exchange(here: Partial, mesh: Mesh, row_split: RowSplit) -> Partial:
    """Return the results of all devices for this device's queries, [P, B, k, t, g, …], in one exchange."""
    heads, rows = mesh.shape[HEADS], mesh.shape[ROWS]

    def parts(x):
        """Return x divided by receiver: by heads, and by rows where it is split."""
        x = x.reshape(x.shape[0], heads, -1, *x.shape[2:])
        axis = None if row_split is None else _AXIS[row_split] + 1
        if axis is None or x.shape[axis] == 1:
            x = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], rows, *x.shape[2:]))
        else:
            x = x.reshape(*x.shape[:axis], rows, -1, *x.shape[axis + 1 :])
            x = jnp.moveaxis(x, axis, 2)
        return jnp.moveaxis(x, 0, 2).reshape(heads * rows, *x.shape[:1], *x.shape[3:])

    sent = [parts(x) for x in here]
    flat = jnp.concatenate([x.reshape(heads * rows, -1) for x in sent], axis=1)
    flat = lax.all_to_all(flat, MODEL, split_axis=0, concat_axis=0, tiled=True)
    ends = np.cumsum([x[0].size for x in sent])[:-1]
    return Partial(*(x.reshape(like.shape) for x, like in zip(jnp.split(flat, ends, axis=1), sent, strict=True)))


def _merge(partials: Partial, n: jax.Array) -> kernel.State:
    """Return the state [B, k, R, …] merged from devices [P, B, k, t, g, …], with the compensation token where
    n [B, k, 1, 1] is not 0."""
    token = jnp.where(
        n > 0, jnp.sum(partials.logit, axis=0) + jnp.log(jnp.maximum(n, 1).astype(jnp.float32)), kernel.NEG
    )
    top = jnp.maximum(jnp.max(partials.m, axis=0), token)
    weight, weight_of_token = jnp.exp(partials.m - top), jnp.where(n > 0, jnp.exp(token - top), 0.0)
    acc = jnp.sum(partials.acc * weight[..., None], axis=0) + weight_of_token[..., None] * jnp.sum(
        partials.value, axis=0
    )
    l = jnp.sum(partials.l * weight, axis=0) + weight_of_token
    B, k, _, _, H = acc.shape
    return acc.reshape(B, k, -1, H), top.reshape(B, k, -1), l.reshape(B, k, -1)
